"""Mistakes in lab 4: what to replace in a question of its master, the points it loses, what the checks say."""

GUARD = "if i < packed.size:"
TABLE = "    if cuda.threadIdx.x < 16:\n        table[cuda.threadIdx.x] = levels[cuda.threadIdx.x]\n"
BARRIER = "    cuda.syncthreads()\n"
NUMBER = "cuda.blockIdx.x * cuda.blockDim.x + cuda.threadIdx.x"
ROUND = "            largest[t] = max(largest[t], largest[t + stride])\n        cuda.syncthreads()\n"
VALUES = "on_whole_blocks", "on_other_sizes", "with_an_odd_rest_and_idle_threads"
# (what the mistake is called, question, old, new, points lost, what its author is told)
OF_ONE_QUESTION = [
    ("sectors side by side", "q1", "return len(", "return width or len(", 2, "side by side"),
    ("first byte only", "q1", "for b in range(width)", "for b in range(1)", 2, "lie across two sectors"),
    (
        "sectors counted by thread",
        "q1",
        "return len({(start + b) // 32 for start in starts for b in range(width)})",
        "return sum(len({(s + b) // 32 for b in range(width)}) for s in starts)",
        2,
        "count each sector once",
    ),
    (
        "sectors by stretch",
        "q1",
        "return len(",
        "return -(-(31 * stride + width) // 32) or len(",
        2,
        "stretch from the first byte to the last",
    ),
    ("constants forgotten", "q2", " + 4 * -(-n // block_size)", "", 2, "absmax of each block is read too"),
    ("a byte a constant", "q2", "4 * -(-n", "-(-n", 2, "4 bytes, not 1"),
    ("last block rounded off", "q2", "-(-n // block_size)", "(n // block_size)", 2, "short last block"),
    ("odd byte rounded off", "q2", "(n + 1) // 2", "n // 2", 2, "last byte of an odd n"),
    ("a byte a code", "q2", "(n + 1) // 2", "n", 2, "two codes share a byte"),
    ("float32 written", "q2", "2 * n\n", "4 * n\n", 2, "a float16 has 2 bytes"),
    ("bytes with a fraction", "q2", "(n + 1) // 2", "n / 2", 2, "// instead of /"),
    ("blocks rounded down", "q4", "-(-n_bytes // threads)", "n_bytes // threads", 2, "rounded down: the last"),
    ("a block too many", "q4", "-(-n_bytes // threads)", "n_bytes // threads + 1", 2, "one more than needed"),
    ("blocks with a fraction", "q4", "-(-n_bytes // threads)", "n_bytes / threads", 2, "a launch takes a whole number"),
    ("a thread an element", "q4", "-(-n_bytes // threads)", "-(-2 * n_bytes // threads)", 2, "not an element"),
    ("levels above", "q8", "s > boundaries[b]", "s < boundaries[b]", 3, "boundaries above s were counted"),
    ("ties go up", "q8", "s > boundaries[b]", "s >= boundaries[b]", 3, "a tie goes to the lower level"),
    ("a boundary left out", "q8", "range(15)", "range(14)", 3, "there are 15"),
    ("codes from 1", "q8", "code = 0", "code = 1", 3, "codes count from 0"),
    ("not a device function", "q8", "@cuda.jit(device=True)\n", "", 3, r"put @cuda.jit\(device=True\) above it"),
    ("signed maximum", "q9", "max(abs(value) for value in x)", "max(x)", 4, "largest magnitude needs abs"),
    ("nibbles swapped", "q9", "high << 4 | low", "low << 4 | high", 4, "nibbles are swapped"),
    ("divided", "q9", "value * inverse", "value / max(absmax, float32(1e-9))", 2, "divided by absmax; the rule mult"),
    ("zeros unguarded", "q9", "if absmax > 0 else float32(0)", "", 2, "take 0 for the reciprocal"),
    ("odd rest filled with 0", "q9", "append(7)", "append(0)", 2, "holds the code of zero, 7"),
    ("odd rest dropped", "q9", "codes.append(7)", "codes.pop()", 2, "values make .* bytes; got"),
    ("not scaled", "q9", "value * inverse", "value", 4, "not scaled by their absmax"),
    ("only bytes returned", "q9", "[0::2], codes[1::2])], absmax", "[0::2], codes[1::2])]", 4, "must return"),
    ("signed maximum", "q10", "max(abs(even), abs(odd))", "max(even, odd)", 5, "largest magnitude needs abs"),
    ("nibbles swapped", "q10", "high << 4 | low", "low << 4 | high", 5, "nibbles are swapped"),
    ("zeros unguarded", "q10", "if scale > 0 else float32(0)", "", 2, "take 0 for the reciprocal"),
    (
        "divided",
        "q10",
        ("even * inverse", "odd * inverse"),
        ("even / max(scale, float32(1e-9))", "odd / max(scale, float32(1e-9))"),
        2,
        "divided by absmax; the rule multiplies",
    ),
    ("one thread's pair", "q10", "stride = 16", "stride = 0", 5, "all 32 must meet"),
    ("first round left out", "q10", "stride = 16", "stride = 8", 5, "half of the threads are left out"),
    ("no barrier before the rounds", "q10", "abs(odd))\n    cuda.syncthreads()\n", "abs(odd))\n", 8, "race.*largest"),
    ("no barrier between rounds", "q10", ROUND, ROUND.replace("        cuda.syncthreads()\n", ""), 8, "race.*largest"),
    (
        "barrier for some threads",
        "q10",
        ROUND,
        ROUND.replace("        cuda.syncthreads()\n", "            cuda.syncthreads()\n"),
        8,
        "must be reached by every thread",
    ),
    ("no guard on x", "q10", "x[j] if j < x.size else float32(0)", "x[j]", 2, "the last block may be short"),
    ("no guard on an odd n", "q10", "x[j + 1] if j + 1 < x.size else float32(0)", "x[j + 1]", 2, "n may be odd"),
    ("absmax by all", "q10", "if t == 0:", "if t >= 0:", 3, "let thread 0 write it"),
    ("absmax by nobody", "q10", "if t == 0:", "if t == 32:", 8, r"absmax\[0\] is never written"),
    ("values read twice", "q10", "even * inverse", "x[j] * inverse", 3, "keep both values of a thread in variables"),
    (
        "a thread a nibble",
        "q10",
        "        packed[j // 2] = high << 4 | low",
        "        packed[t // 2] = high << 4 | low",
        8,
        "race.*packed|packed.*written by",
    ),
    ("rows without a gap", "q11", "(width + 4)", "width", 4, "begin in the same bank"),
    ("one word free", "q11", "(width + 4)", "(width + 1)", 4, "moves the next row by one bank"),
    ("two words free", "q11", "(width + 4)", "(width + 2)", 4, "rows 0 to 7, in a tile .* takes 2 turns: bank 2 is"),
    ("too much free", "q11", "(width + 4)", "(width + 12)", 4, r"a tile of \d+ rows has 0 to \d+"),
    ("one width only", "q11", "(width + 4)", "36", 3, "one word would overwrite the other"),
    ("single words exchanged", "q11", "(width + 4) + word", "width + (word ^ row)", 4, "exchanges single words"),
    ("columns first", "q11", "row * (width + 4) + word", "8 * word + row", 4, "columns one behind|overwrite the other"),
    ("bytes", "q11", "row * (width + 4) + word", "4 * (row * (width + 4) + word)", 4, "a word, not of a byte"),
    ("below zero", "q11", "+ word", "- word", 4, "places count from 0"),
    ("a quotient", "q11", "+ word", "+ word / 2", 4, "expected a whole number, got 0.5"),
]


def as_in(question, text):
    """A text of v1's body as it stands in another question's."""
    if isinstance(text, tuple):
        return tuple(as_in(question, part) for part in text)
    if question == "q3":
        return text.replace("// 64", "// block_size")
    return text


LOST_OF_4 = {5: 4, 3: 2, 2: 2}  # question 3 has one public check for whole blocks and edges, the kernels have two
BODY = [  # mistakes in what one thread does: (name, old, new, points lost of 5, message)
    ("nibbles swapped", ("[byte >> 4]", "[byte & 15]"), ("[byte & 15 ]", "[byte >> 4]"), 3, "nibbles are swapped"),
    ("block by byte", "2 * i // 64", "i // 64", 3, "counted in bytes"),
    ("absmax of the next block", "2 * i // 64", "min(2 * i // 64 + 1, absmax.size - 1)", 3, "that of the next block"),
    ("one absmax", "2 * i // 64", "0", 3, "absmax of block 0 was used for all"),
    ("not multiplied", " * scale", "", 3, "not multiplied by its absmax"),
    ("three bits", "byte & 15", "byte & 7", 3, "& 15 keeps four"),
    ("a byte read twice", "[byte & 15]", "[packed[i] & 15]", 2, "one thread reads it once"),
    ("odd tail unguarded", "2 * i + 1 < out.size", "i < out.size", 2, "low nibble is no element"),
    ("odd tail left out", "2 * i + 1 < out.size", "2 * i + 2 < out.size", 5, "never written"),
]
KERNEL = [
    ("no blocks", NUMBER, "cuda.threadIdx.x", 5, "and again by thread 0 of block 1"),
    ("grid for block", "cuda.blockIdx.x * cuda.blockDim.x", "cuda.blockIdx.x * cuda.gridDim.x", 5, "is cuda.block"),
]  # fmt: skip
NO_LOOP = [
    ("no guard", GUARD, "if i < out.size:", 2, "some threads have no byte"),
    ("threads far apart", NUMBER, "cuda.threadIdx.x * cuda.gridDim.x + cuda.blockIdx.x", 2, "neighbouring threads"),
]
WITH_TABLE = [
    ("no barrier", BARRIER, "", 5, "race.*table"),
    ("barrier in the guard", TABLE + BARRIER, TABLE + "        cuda.syncthreads()\n", 5, "reached by every thread"),
    ("levels not from the table", "table[byte & 15]", "levels[byte & 15]", 2, "levels is read"),
    (
        "every thread fills all",
        TABLE,
        "    for k in range(16):\n        table[k] = levels[k]\n",
        2,
        "copy one level each",
    ),
    ("half a table", "cuda.threadIdx.x < 16", "cuda.threadIdx.x < 8", 5, "which no thread has written"),
    ("table too short", "if cuda.threadIdx.x < 16:", "if cuda.threadIdx.x < 32:", 5, "levels has 16 elements"),
]
STRIDE = "range(start, packed.size, cuda.gridDim.x * cuda.blockDim.x)"
SHARE = "-(-packed.size // (cuda.gridDim.x * cuda.blockDim.x))"
OF_ONE_QUESTION += [
    (
        "stride of one block",
        "q7",
        STRIDE,
        "range(start, packed.size, cuda.blockDim.x)",
        5,
        "and again by thread 0 of block 1",
    ),
    ("one round", "q7", STRIDE, "range(start, packed.size, packed.size)", 5, "No thread takes the bytes from there on"),
    (
        "no end",
        "q7",
        STRIDE,
        "iter(lambda: start, packed.size)",
        5,
        "written by thread 0 of block 0 and again by thread 0 of block 0",
    ),
    (
        "a stretch for each thread",
        "q7",
        STRIDE,
        f"range(start * {SHARE}, min((start + 1) * {SHARE}, packed.size))",
        2,
        "neighbouring threads must take neighbouring bytes",
    ),
]
OF_SEVERAL = [
    (name, question, as_in(question, old), as_in(question, new), LOST_OF_4[lost] if question == "q3" else lost, message)
    for questions, mistakes in (
        (("q3", "q5", "q6", "q7"), BODY),
        (("q5", "q6"), NO_LOOP),
        (("q5", "q6", "q7"), KERNEL),
        (("q6", "q7"), WITH_TABLE),
    )
    for question in questions
    for name, old, new, lost, message in mistakes
]


def changes(old, new):
    return dict(zip(old, new, strict=True)) if isinstance(old, tuple) else {old: new}


MISTAKES = {
    f"{question} {name}": ((question, changes(old, new)), lost, f"(?s){message}")
    for name, question, old, new, lost, message in OF_ONE_QUESTION + OF_SEVERAL
}
