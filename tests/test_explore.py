"""The explorables, each as a page of its own in a browser without network: their numbers are the package's."""

import math
import re
import shutil
from collections import defaultdict

import pytest
import scipy.stats
import torch

import nf4lab
from nf4lab import codebooks, explore, theory
from nf4lab.explore import traces

pytest.importorskip("playwright.sync_api")
pytestmark = pytest.mark.skipif(not shutil.which("chromium"), reason="no Chromium: install Debian's package `chromium`")
NAMES = [name for name in explore.__all__ if name.islower()]
ROOT = "document.querySelector('[data-explorable]').shadowRoot"


@pytest.fixture(scope="module")
def explorables():
    """Each explorable, made once."""
    return {name: getattr(explore, name)() for name in NAMES}


@pytest.fixture
def opened(browser, tmp_path):
    """A function that opens HTML in a page, and fails the test after it if a script failed or the network was asked."""
    pages, notes = [], []

    def open_html(html, width=820, theme="light", touch=False):
        context = browser.new_context(
            viewport={"width": width, "height": 900}, color_scheme=theme, has_touch=touch, reduced_motion="reduce"
        )
        page = context.new_page()
        pages.append(page)
        page.on("console", lambda message: notes.append(message.text) if message.type in ("error", "warning") else None)
        page.on("pageerror", lambda error: notes.append(f"script: {error}"))
        page.on("request", lambda request: notes.append(request.url) if not request.url.startswith("file:") else None)
        path = tmp_path / f"{len(pages)}.html"
        path.write_text(html, encoding="utf-8")
        page.goto(path.as_uri())
        return page

    yield open_html
    for page in pages:
        page.context.close()
    assert not notes


def value(page, key):
    """The exact number behind a readout."""
    return float(page.locator(f"[data-out={key}]").get_attribute("data-value"))


def move(page, label, to):
    """Set the range input of that label to a position."""
    page.get_by_role("slider", name=label).fill(str(to))


# All of them


@pytest.mark.parametrize(("width", "theme"), [(360, "dark"), (820, "dark"), (1440, "light")])
@pytest.mark.parametrize("name", NAMES)
def test_an_explorable_meets_wcag_and_fits_the_window(opened, explorables, name, width, theme):
    axe = pytest.importorskip("axe_playwright_python.sync_playwright").Axe()
    page = opened(explorables[name].page, width, theme)
    page.locator("section.card").wait_for()
    results = axe.run(page)
    assert results.violations_count == 0, results.generate_report()
    assert page.evaluate("document.documentElement.scrollWidth") <= width


@pytest.mark.parametrize("name", NAMES)
def test_an_explorable_weighs_little_and_brings_all_it_needs(explorables, name):
    html = explorables[name].html
    assert len(html.encode()) < 80_000  # a chapter's first load may be 1.5 MB
    assert html.count("<script") == html.count("</script>") == 1
    assert not re.search(r"https?://(?!www\.w3\.org/2000/svg)|@import|url\(|\bimport\b\s*[({\"]|fetch\(", html)
    assert explorables[name].summary.split("'")[0] in html  # what a reader without JavaScript gets


@pytest.mark.parametrize("name", NAMES)
def test_every_control_of_an_explorable_has_a_name_and_says_its_value(opened, explorables, name):
    page = opened(explorables[name].page)
    sliders = page.get_by_role("slider").all()
    assert all(slider.get_attribute("aria-label") for slider in sliders)
    assert all(slider.get_attribute("aria-valuetext").strip() for slider in sliders)
    assert page.get_by_role("status").count() == 1


def test_a_result_is_announced_once_the_reader_rests(opened, explorables):
    page = opened(explorables["block"].page)
    assert page.get_by_role("status").inner_text() == ""
    page.get_by_role("button", name="Make weight").click()
    page.wait_for_function(f"{ROOT}.querySelector('[role=status]').textContent")
    assert re.match(r"absmax 12\.0\. \d+ of 16 weights are stored as zero", page.get_by_role("status").inner_text())


def test_two_explorables_and_one_twice_share_a_page(opened, explorables):
    block, bits = explorables["block"].html, explorables["bits"].html
    page = opened(f"<!doctype html><html lang='en'><title>many</title><body>{bits}{block}{block}</body></html>")
    assert page.locator("section.card").count() == 3
    page.get_by_role("button", name="Make weight").last.click()
    texts = page.locator("[data-out=absmax]").evaluate_all("nodes => nodes.map(node => +node.dataset.value)")
    assert texts[1] == 12 and texts[0] != 12


THEMES = {
    "the book": ("document.documentElement.dataset.theme = '{}'", "dark", "light"),
    "Colab": ("document.documentElement.setAttribute('theme', '{}')", "dark", "light"),
    "JupyterLab": ("document.body.dataset.jpThemeLight = '{}'", "false", "true"),
    "VS Code": ("document.body.className = 'vscode-body {}'", "vscode-dark", "vscode-light"),
}


def test_an_explorable_runs_in_the_frame_that_a_notebook_gives_an_output(opened, explorables):
    """Colab and others put an output's HTML into a sandboxed frame, and make its scripts anew so that they run."""
    fragment = explorables["block"].html
    page = opened("<!doctype html><html lang='en'><title>notebook</title><body></body></html>", width=360)
    page.evaluate(
        """html => {
          const frame = document.createElement("iframe");
          frame.sandbox = "allow-scripts";
          frame.srcdoc = "<!doctype html><html theme='dark'><body><div id='output'></div><script>"
            + "addEventListener('message', e => {"
            + "const output = document.getElementById('output'); output.innerHTML = e.data;"
            + "for (const old of output.querySelectorAll('script')) { const made = document.createElement('script');"
            + "made.textContent = old.textContent; old.replaceWith(made); } })</scr" + "ipt></body></html>";
          frame.onload = () => frame.contentWindow.postMessage(html, "*");
          document.body.append(frame);
        }""",
        fragment,
    )
    frame = page.frame_locator("iframe")
    frame.get_by_role("button", name="Make weight 5 an outlier").click()
    assert frame.locator("[data-out=absmax]").get_attribute("data-value") == "12"
    assert "dark" in frame.locator("section.card").get_attribute("class")


@pytest.mark.parametrize("where", THEMES)
def test_an_explorable_follows_the_theme_of_the_page(opened, explorables, where):
    page = opened(explorables["bits"].page, theme="light")
    script, dark, light = THEMES[where]
    for name, expected in ((dark, True), (light, False)):
        page.evaluate(script.format(name))
        page.wait_for_function(f"dark => Boolean({ROOT}.querySelector('.card.dark')) === dark", arg=expected)


def test_arrow_keys_stay_with_the_control_that_has_the_focus(opened, explorables):
    page = opened(explorables["block"].page)
    page.evaluate("document.addEventListener('keydown', event => { document.title += event.key; })")
    page.get_by_role("slider", name="weight 3", exact=True).press("ArrowRight")
    assert "Arrow" not in page.title()
    page.locator("h1").click()
    page.keyboard.press("ArrowRight")
    assert page.title().endswith("ArrowRight")


def test_making_an_explorable_leaves_the_seed_of_a_chapter_alone():
    torch.manual_seed(0)
    before = torch.get_rng_state()
    for name in NAMES:
        getattr(explore, name)(*([{}] if name == "who_wins" else []))  # its own matrices take longer
    assert torch.equal(torch.get_rng_state(), before)


# One block


def handles(page):
    return [page.get_by_role("slider", name=f"weight {i}", exact=True) for i in range(16)]


def assert_the_block_is_what_the_package_makes_of_its_weights(page):
    w = torch.tensor([float(handle.get_attribute("aria-valuenow")) for handle in handles(page)])
    q = nf4lab.quantize(w, "nf4", block_size=16)
    codes = [int(cell) for cell in page.locator("[data-code]").all_inner_texts()]
    assert codes == q.codes.tolist()
    assert page.locator("[data-byte]").all_inner_texts() == [f"{byte:02x}" for byte in q.packed.tolist()]
    assert value(page, "absmax") == q.absmax.item()
    assert value(page, "zeros") == (q.dequantize() == 0).sum()
    # Sixteen squares of float32 numbers, summed in float64 by both.
    assert math.isclose(value(page, "mse"), nf4lab.mse(w, q.dequantize()), rel_tol=1e-12)
    assert value(page, "bits") == q.nbytes


def test_a_block_moved_by_its_keys_has_the_codes_bytes_and_error_of_the_package(opened, explorables):
    page = opened(explorables["block"].page)
    assert_the_block_is_what_the_package_makes_of_its_weights(page)
    for i, keys in (
        (0, "ArrowUp " * 3),
        (5, "PageDown " * 6),
        (5, "ArrowDown"),
        (10, "Home"),
        (10, "End"),
        (15, "PageUp"),
    ):
        for key in keys.split():
            handles(page)[i].press(key)
        assert_the_block_is_what_the_package_makes_of_its_weights(page)
    assert handles(page)[10].get_attribute("aria-valuenow") == "30"


def test_a_key_goes_out_of_the_linear_part_of_the_axis_and_comes_back(opened, explorables):
    page = opened(explorables["block"].page)
    handle, seen = handles(page)[1], []
    for key in ["PageUp"] * 5 + ["ArrowUp"] * 2 + ["ArrowDown"] * 3:
        handle.press(key)
        seen.append(float(handle.get_attribute("aria-valuenow")))
    assert seen == [1.55, 2.05, 2.55, 3.0, 3.5, 4.0, 4.5, 4.0, 3.5, 3.0]


@pytest.mark.parametrize("width", [360, 1440])
def test_a_weight_follows_the_mouse_and_the_finger(opened, explorables, width):
    page = opened(explorables["block"].page, width, touch=True)
    handle = handles(page)[5]
    before = float(handle.get_attribute("aria-valuenow"))
    handle.scroll_into_view_if_needed()
    box = handle.bounding_box()
    x, y = box["x"] + box["width"] / 2, box["y"] + box["height"] / 2
    page.mouse.move(x, y)
    page.mouse.down()
    page.mouse.move(x, y - 60, steps=4)
    page.mouse.up()
    page.mouse.move(x, y)
    after = float(handle.get_attribute("aria-valuenow"))
    assert after > before + 0.5
    assert_the_block_is_what_the_package_makes_of_its_weights(page)

    box = handle.bounding_box()
    x, y = box["x"] + box["width"] / 2, box["y"] + box["height"] / 2
    assert handle.evaluate("node => getComputedStyle(node).touchAction") == "none"  # else the page would scroll
    session = page.context.new_cdp_session(page)
    for kind, points in (
        ("touchStart", [{"x": x, "y": y}]),
        ("touchMove", [{"x": x, "y": y + 40}]),
        ("touchMove", [{"x": x, "y": y + 70}]),
        ("touchEnd", []),
    ):
        session.send("Input.dispatchTouchEvent", {"type": kind, "touchPoints": points})
    page.wait_for_timeout(50)
    assert float(handle.get_attribute("aria-valuenow")) < after - 0.5
    assert_the_block_is_what_the_package_makes_of_its_weights(page)


def test_a_tap_in_a_column_moves_its_weight_there_without_dragging(opened, explorables):
    page = opened(explorables["block"].page, 360, touch=True)
    handle = handles(page)[2]
    handle.scroll_into_view_if_needed()
    box = page.locator(".column .track").nth(2).bounding_box()
    page.touchscreen.tap(box["x"] + box["width"] / 2, box["y"] + 0.25 * box["height"])
    moved = float(handle.get_attribute("aria-valuenow"))
    assert 2 < moved < 2.5  # a quarter of the way from the top: the linear part, to 3, starts at 0.16
    assert_the_block_is_what_the_package_makes_of_its_weights(page)
    page.touchscreen.tap(*(handle.bounding_box()[k] + 16 for k in "xy"))
    assert float(handle.get_attribute("aria-valuenow")) == moved


def test_a_block_of_zeros_has_the_code_of_zero_everywhere(opened, explorables):
    data = explorables["block"].data | {"weights": [0.0] * 16}
    page = opened(explore.Explorable("block", data, "zeros").page)
    assert_the_block_is_what_the_package_makes_of_its_weights(page)
    assert set(page.locator("[data-code]").all_inner_texts()) == {"7"}


def test_weights_beside_the_boundaries_get_the_codes_that_float32_gives_them(opened, explorables):
    boundaries, different = nf4lab.FORMATS["nf4"].boundaries, 0
    for absmax in range(1, 9):
        w = torch.cat([torch.tensor([float(absmax)]), absmax * boundaries])
        page = opened(explore.Explorable("block", explorables["block"].data | {"weights": w.tolist()}, "").page)
        codes = [int(cell) for cell in page.locator("[data-code]").all_inner_texts()]
        assert codes == nf4lab.quantize(w, "nf4", block_size=16).codes.tolist()
        different += codes != nf4lab.FORMATS["nf4"].nearest(w / absmax).tolist()
    assert different  # dividing instead of multiplying by the reciprocal would have shown


def test_an_outlier_takes_the_others_to_zero_and_can_be_calmed(opened, explorables):
    page = opened(explorables["block"].page)
    first = value(page, "zeros"), value(page, "mse")
    page.get_by_role("button", name="Make weight 5 an outlier").click()
    assert_the_block_is_what_the_package_makes_of_its_weights(page)
    assert value(page, "zeros") > first[0] and value(page, "mse") > 10 * first[1] and value(page, "bits") == 12
    page.get_by_role("button", name="Calm weight 5").click()
    assert (value(page, "zeros"), value(page, "mse")) == first


# Bits


def test_bits_and_gigabytes_of_every_setting_are_those_of_a_quantized_tensor(opened, explorables):
    page = opened(explorables["bits"].page)
    n = 2**20  # whole groups of 256 blocks at every block size
    w = torch.zeros(n)
    plain = {"32 (float32)": torch.float32, "16 (bfloat16)": torch.bfloat16, "8 (E4M3)": torch.float8_e4m3fn}
    settings = [(label, dtype, False) for label, dtype in plain.items()]
    settings += [("8 bits", torch.float32, "dynamic8"), ("4 bits", torch.float32, "linear4")]
    for label, dtype, double_quant in settings:
        page.get_by_role("radio", name=label, exact=True).check()
        for i, block_size in enumerate(nf4lab.BLOCK_SIZES):
            move(page, "block size", i)
            format = nf4lab.Format("nf4", codebooks.nf4(), constants_dtype=dtype)
            q = nf4lab.quantize(w, format, block_size, double_quant=double_quant)
            offset = 32 / n if double_quant else 0  # one float32 per tensor, which the figure leaves out
            bits = q.bits_per_weight - offset
            assert value(page, "bits") == bits
            assert math.isclose(value(page, "small"), 7e9 * bits / 8 / 1e9, rel_tol=1e-15)
            assert math.isclose(value(page, "large"), 70e9 * bits / 8 / 1e9, rel_tol=1e-15)
    page.get_by_role("radio", name="off").check()
    page.get_by_role("radio", name="16 (bfloat16)").check()
    assert value(page, "bits") == 4 + 16 / nf4lab.BLOCK_SIZES[-1]


def test_the_error_of_a_setting_is_the_packages_and_the_best_within_the_budget_is_named(opened, explorables):
    page = opened(explorables["bits"].page)
    w = torch.randn(2**18, generator=explore.seeded(5))
    page.get_by_role("radio", name="8 bits", exact=True).check()
    q = nf4lab.quantize(w, "nf4", 64, double_quant=True)
    assert value(page, "error") == nf4lab.mse(w, q.dequantize())
    assert "★" in page.locator("[data-out=error]").inner_text()
    page.get_by_role("radio", name="off").check()
    move(page, "block size", nf4lab.BLOCK_SIZES.index(256))
    assert value(page, "bits") == 4.125 and "✓" in page.locator("[data-out=bits]").inner_text()
    assert value(page, "error") > nf4lab.mse(w, q.dequantize())
    assert "★" not in page.locator("[data-out=error]").inner_text()


# Levels


def test_the_levels_are_those_of_the_package_to_the_bit(opened, explorables):
    page = opened(explorables["levels"].page)
    for family in explore.FAMILIES:
        page.get_by_role("group", name="levels made for").get_by_role("radio", name=family).check()
        for position, n_levels in ((0, 4), (13, 16), (40, 7), (44, 15)):
            move(page, "tail probability", position)
            move(page, "number of levels", n_levels)
            shown = torch.tensor([float(x) for x in page.locator("figure svg").get_attribute("data-levels").split()])
            expected = codebooks.split_quantiles(explore.TAILS[position], n_levels, explore.FAMILIES[family])
            assert torch.equal(shown, expected)


def set_levels(page, weights, made_for, position, n_levels):
    """Set all four controls; the format and the density that they stand for."""
    page.get_by_role("group", name="weights to quantize").get_by_role("radio", name=weights).check()
    page.get_by_role("group", name="levels made for").get_by_role("radio", name=made_for).check()
    move(page, "tail probability", position)
    move(page, "number of levels", n_levels)
    levels = codebooks.split_quantiles(explore.TAILS[position], n_levels, explore.FAMILIES[made_for])
    return nf4lab.Format("trial", levels), explore.FAMILIES[weights]


def shown_usage(page):
    return torch.tensor([float(x) for x in page.locator("figure svg").get_attribute("data-usage").split()]).double()


def test_usage_and_error_of_levels_are_those_of_the_theory(opened, explorables):
    page = opened(explorables["levels"].page)
    for weights, made_for, position, n_levels in (
        ("normal", "normal", 13, 16),
        ("normal", "uniform", 0, 4),
        ("Student t", "normal", 25, 16),
        ("Student t", "Student t", 44, 9),
        ("uniform", "normal", 13, 16),
        ("uniform", "uniform", 13, 15),
    ):
        format, density = set_levels(page, weights, made_for, position, n_levels)
        expected = theory.expected(format, 64, density)
        # The figure integrates tables of positive float32 numbers, each off by at most 6e-8 of itself, by cubics and
        # Simpson's rule, which at 257 points lose no more than that again.
        assert math.isclose(value(page, "mse"), expected.mse, rel_tol=1e-6)
        assert torch.allclose(shown_usage(page), expected.usage.double(), rtol=0, atol=1e-7)
        assert math.isclose(value(page, "entropy"), nf4lab.entropy_bits(expected.usage), abs_tol=1e-5)


def test_usage_and_error_of_levels_are_those_of_a_large_sample(opened, explorables):
    page = opened(explorables["levels"].page)
    format, density = set_levels(page, "Student t", "normal", 20, 12)
    w = torch.from_numpy(density.rvs(2**20, random_state=3)).float()
    q = nf4lab.quantize(w, format, block_size=64)
    squares = (w - q.dequantize()).double().square().reshape(-1, 64).mean(dim=1)  # (n_blocks,), independent
    error = squares.std().item() / len(squares) ** 0.5
    assert abs(value(page, "mse") - squares.mean().item()) < 4 * error < 0.05 * value(page, "mse")
    # The share of a code is a mean over weights that share an absmax: by blocks, its standard error is known.
    by_block = torch.nn.functional.one_hot(q.codes.long(), 16)[:, :12].reshape(-1, 64, 12).double().mean(dim=1)
    away = (shown_usage(page) - by_block.mean(dim=0)).abs()
    assert (away < 4.5 * by_block.std(dim=0) / len(by_block) ** 0.5).all()


def test_where_the_codes_are_most_even_the_error_is_nearly_twice_nf4s(opened, explorables):
    page = opened(explorables["levels"].page)
    field, found = page.get_by_role("slider", name="tail probability"), {}
    field.press("Home")
    for tail in explore.TAILS:
        found[tail] = value(page, "entropy"), value(page, "mse")
        field.press("ArrowRight")
    nf4 = found[codebooks.TAIL][1]
    assert abs(nf4 - 0.008460) < 1e-6  # by quadrature, as chapter 6 has it
    assert 1.8 < max(found.values())[1] / nf4 < 2


def test_the_recipe_of_nf4_takes_other_densities_and_numbers_of_levels():
    assert torch.equal(codebooks.split_quantiles(), codebooks.nf4())
    five = codebooks.split_quantiles(0.9, 5, scipy.stats.uniform(-1, 2))
    assert torch.allclose(five, torch.tensor([-1, -0.5, 0, 0.5, 1]), atol=1e-6)
    with pytest.raises(ValueError, match="3 levels; got 2"):
        codebooks.split_quantiles(n_levels=2)


# Who wins


def table(page):
    """The rows of the ranking: (format, block size, bits, error), as the page orders them."""
    rows = page.locator("tbody tr").evaluate_all("rows => rows.map(row => ({ ...row.dataset }))")
    return [(r["format"], int(r["size"] or 0), float(r["bits"] or 0), float(r["mse"] or "inf")) for r in rows]


def test_the_ranking_at_equal_block_size_has_the_errors_of_the_package(opened, explorables):
    page = opened(explorables["who_wins"].page)
    w = torch.randn(2**18, generator=explore.seeded(6))
    for block_size in (64, 1024):
        move(page, "equal at", nf4lab.BLOCK_SIZES.index(block_size))
        rows = table(page)
        assert [row[3] for row in rows] == sorted(row[3] for row in rows) and len(rows) >= 5
        for name, size, bits, mse in rows:
            q = nf4lab.quantize(w, name, block_size)
            assert (size, bits) == (block_size, q.bits_per_weight)
            # Seven digits are kept.
            assert math.isclose(mse, nf4lab.mse(w, q.dequantize()) / w.var().item(), rel_tol=1e-6)
    move(page, "equal at", nf4lab.BLOCK_SIZES.index(64))
    assert [row[0] for row in table(page) if row[0] in ("nf4", "uniform")] == ["uniform", "nf4"]


def test_at_equal_bits_each_format_takes_the_smallest_block_that_fits(opened, explorables):
    page = opened(explorables["who_wins"].page)
    page.get_by_role("radio", name="bits per weight").check()
    for position, budget in enumerate(4 + 32 / size for size in nf4lab.BLOCK_SIZES):
        move(page, "equal at", position)
        for name, size, bits, _ in table(page):
            sizes = explorables["who_wins"].data["sources"][0]["formats"][name]["bits"]
            if not size:
                assert min(sizes) > budget + 0.001
                continue
            assert bits <= budget + 0.001
            smaller = nf4lab.BLOCK_SIZES.index(size) - 1
            assert smaller < 0 or sizes[smaller] > budget + 0.001
        errors = {name: mse for name, _, _, mse in table(page)}
        assert (errors["nf4"] < errors["uniform"]) == (position > 0)  # from blocks of 32 up
    move(page, "equal at", nf4lab.BLOCK_SIZES.index(64))
    sizes = {name: size for name, size, *_ in table(page)}
    assert sizes["nf4"] == 64 and sizes["uniform"] == 128


def test_a_real_layer_can_be_chosen_and_formats_taken_out(opened, explorables):
    page = opened(explorables["who_wins"].page)
    page.get_by_role("combobox", name="weights").select_option("MiniLM, first layer: output")
    w = nf4lab.models.minilm_matrices()["encoder.layer.0.output.dense"].reshape(-1)[: 2**18]
    errors = {name: mse for name, _, _, mse in table(page)}
    for name in ("nf4", "uniform"):
        expected = nf4lab.mse(w, nf4lab.quantize(w, name, 64).dequantize()) / w.var().item()
        assert math.isclose(errors[name], expected, rel_tol=1e-6)
    page.get_by_role("checkbox", name="uniform").uncheck()
    assert "uniform" not in [row[0] for row in table(page)]


def test_every_four_bit_format_is_in_the_race_and_drawn_unlike_any_other(explorables):
    looks = explorables["who_wins"].data["looks"]
    assert list(looks) == [name for name, format in nf4lab.FORMATS.items() if format.code_bits == 4]
    assert len({tuple(look.values()) for look in looks.values()}) == len(looks)
    for source in explorables["who_wins"].data["sources"]:
        assert list(source["formats"]) == list(looks)


# A warp


@pytest.mark.parametrize("name", traces.KERNELS)
def test_a_traced_kernel_decodes_what_the_package_decodes(name):
    _, _, out, q = traces.trace(name)
    assert torch.equal(torch.from_numpy(out).view(torch.int16), q.dequantize().view(torch.int16))


def touched(step, threads):
    """Sectors, bytes wanted, and passes over the banks, counted one by one."""
    wanted, banks = set(), defaultdict(set)
    for first in step["bytes"][:threads]:
        for byte in range(first, first + step["width"]):
            wanted.add(byte)
            banks[byte // 4 % 32].add(byte // 4)
    return len({byte // 32 for byte in wanted}), len(wanted), max(map(len, banks.values()))


@pytest.mark.parametrize("name", traces.KERNELS)
def test_sectors_passes_and_bytes_are_counted_right_thread_by_thread(opened, explorables, name):
    page = opened(explorables["warp"].page)
    (kernel,) = [kernel for kernel in explorables["warp"].data["kernels"] if kernel["name"] == name]
    page.locator(f"input[type=radio][value='{name}']").check()
    for i, step in enumerate(kernel["steps"]):
        move(page, "instruction", i)
        for threads in (32, 5):
            move(page, "threads that have asked", threads)
            sectors, wanted, passes = touched(step, threads)
            if step["space"] == "shared":
                assert value(page, "now") == passes
            else:
                assert value(page, "now") == sectors
                assert value(page, "share") == wanted / (32 * sectors)
    in_memory = [step for step in kernel["steps"] if step["space"] == "global"]
    assert value(page, "requests") == len(in_memory)
    assert value(page, "sectors") == sum(touched(step, 32)[0] for step in in_memory)


def test_the_warp_has_the_counts_of_chapter_7(explorables):
    kernels = {kernel["name"]: kernel for kernel in explorables["warp"].data["kernels"]}
    count = {name: [touched(step, 32) for step in kernel["steps"]] for name, kernel in kernels.items()}
    assert [count["v1"][i][0] for i in (0, 3, 5)] == [1, 4, 4]  # load a byte, store even, store odd
    assert [count["v3"][i][0] for i in (0, -1)] == [4, 16]  # load 4 bytes, store 16
    requests = {
        name: sum(step["space"] == "global" for step in kernel["steps"]) * 256 // kernel["weights"]
        for name, kernel in kernels.items()
    }
    assert requests["v1"] == 24 and requests["v2"] == 16 and requests["v3"] == 3
    # What the figure tells the reader to look for.
    full = {name: all(touched(s, 32)[1] == 32 * touched(s, 32)[0] for s in kernel["steps"] if s["array"] == "out")
            for name, kernel in kernels.items()}  # fmt: skip
    assert [name for name in full if full[name]] == ["v3"]
    conflicts = {
        name for name, k in kernels.items() for s in k["steps"] if s["space"] == "shared" and touched(s, 32)[2] > 1
    }
    assert conflicts == {"byte table"}


def test_next_and_thread_by_thread_walk_through_the_warp(opened, explorables):
    page = opened(explorables["warp"].page)  # reduced motion: a step a press
    lanes = page.get_by_role("slider", name="threads that have asked")
    button = page.get_by_role("button", name="Thread by thread")
    for expected in ("1 of 32", "2 of 32", "3 of 32"):
        button.click()
        assert lanes.get_attribute("aria-valuetext") == expected
    page.get_by_role("button", name="Next instruction").click()
    assert page.get_by_role("slider", name="instruction").get_attribute("aria-valuetext") == "2, load the absmax"
