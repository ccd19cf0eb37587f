"""What a file is that was taken for another, by its first bytes."""

BEGINNINGS = {
    b"PK\x03\x04": "a zip archive: PyTorch's pickle (.bin, .pt) or NumPy's .npz",
    b"\x80\x02": "a pickle, which can run code when it is opened",
    b"\x80\x03": "a pickle, which can run code when it is opened",
    b"\x80\x04": "a pickle, which can run code when it is opened",
    b"\x80\x05": "a pickle, which can run code when it is opened",
    b"GGUF": "a GGUF file, llama.cpp's",
    b"version https://git-lfs": "a Git LFS pointer: `git lfs pull` fetches the file that it stands for",
    b"<!doctype html": "a web page: the download gave an error or a login, not the file",
    b"<html": "a web page: the download gave an error or a login, not the file",
    b"\x89HDF": "an HDF5 file",
    b"\x93NUMPY": "a NumPy array",
    b"\x1f\x8b": "a gzip archive",
    b"\x28\xb5\x2f\xfd": "a Zstandard archive",
    b"7z\xbc\xaf\x27\x1c": "a 7z archive",
    b"\xfd7zXZ": "an xz archive",
    b"BZh": "a bzip2 archive",
    b"PK\x05\x06": "an empty zip archive",
    b"\x89PNG": "a picture",
    b"\xff\xd8\xff": "a picture",
    b"{": "JSON",
}


def kind_of(beginning: bytes) -> str:
    """What a file of that beginning is; empty where it does not tell."""
    text = beginning.removeprefix(b"\xef\xbb\xbf").lstrip().lower()  # some editors write that mark before a text
    return next((what for known, what in BEGINNINGS.items() if text.startswith(known.lower())), "")
