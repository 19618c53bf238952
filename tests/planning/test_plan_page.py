"""The page of a plan, in windows of every width: bars, numbers and names that are as long as a file's."""

import itertools
from typing import Any

import pytest

from fxopt.inspection.numbers import in_bytes
from fxopt.planning.plan import PARTS, Plan, Row

pytestmark = pytest.mark.xdist_group("browser")

LONG = "our-policy-file-with-a-long-name-for-embeddings-norms-and-heads-in-float32.yaml"
GIGABYTE = 10**9


def planned(memory: int = 60 * GIGABYTE, num_devices: int = 8) -> Plan:
    rows = []
    for policy, checkpointing, released in itertools.product(("bf16-islands", LONG), (False, True), (False, True)):
        gradients = 0 if released else 12_600 * 10**6
        gathered = 441 * 10**6 if num_devices > 1 else 0
        place = "add_rms_norm_12 in model.layers.29.post_attention_layernorm (backward)"
        sizes = (16_400 * 10**6, 8_680 * 10**6, gradients, 13_300 * 10**6, 353 * 10**6, gathered)
        rows.append(Row(policy, checkpointing, released, 1024, *sizes, place))
    model = "an-organization/a-model-with-a-long-name-without-any-space-in-it-7B-instruct-of-a-long-series"
    why = f"{LONG} comes first."
    return Plan(model, 124 * 10**7, 2048, num_devices, memory, True, tuple(rows), rows[4], why, (f"/a/path/{LONG}",))


# In pixels of the page: what sticks out of the window or of its cell, and how wide the parts of each bar are.
LOOK = """() => {
  const box = (e) => e.getBoundingClientRect(), all = (s) => [...document.querySelectorAll(s)];
  const sticksOut = (e) => box(e).left < 0 || box(e).right > innerWidth + 0.5 || e.scrollWidth > e.clientWidth + 1;
  const parts = (bar) => [...bar.querySelectorAll("b")].map((e) => box(e).width);
  return {
    width: document.documentElement.scrollWidth,
    outside: all("tbody th, tbody td, h1, p").filter(sticksOut).map((e) => e.textContent),
    bars: all(".parts").map((e) => ({ width: box(e).width, parts: parts(e), right: box(e).right })),
    numbers: all("tbody tr").map((row) => [...row.querySelectorAll("td.part, td.peak")].map((e) => e.innerText)),
    names: all("tbody tr:first-child [data-name]").map((e) => getComputedStyle(e, "::before").content),
  };
}"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [360, 480, 500, 768, 1161, 1200, 1920])
def test_bars_and_numbers_are_in_sight(browser, tmp_path, width, scheme):
    plan = planned()
    found = _look(browser, plan.save(tmp_path / "plan.html"), width, scheme)
    assert found["width"] <= width
    assert found["outside"] == []
    assert [row[-1] for row in found["numbers"]] == [in_bytes(row.peak) for row in plan.rows]
    assert all(len(row) == len(PARTS) + 1 for row in found["numbers"])
    for row, bar in zip(plan.rows, found["bars"], strict=True):
        assert bar["width"] >= (280 if width < 1161 else 150) and bar["right"] <= width
        drawn = [bar["width"] * getattr(row, part) / plan.memory for part in PARTS]  # the memory is the widest here
        assert bar["parts"] == pytest.approx(drawn, abs=0.1)
    # Where the table's head does not fit, each number has its name.
    assert ('"activations"' in found["names"]) == (width < 1161)


def _look(browser: Any, path: Any, width: int, scheme: str = "light") -> Any:
    page = browser.new_page(viewport={"width": width, "height": 740}, color_scheme=scheme)
    page.goto(path.as_uri())
    found = page.evaluate(LOOK)
    page.close()
    return found


@pytest.mark.parametrize("num_devices", [1, 8])
def test_the_page_tells_each_number_and_what_it_is(num_devices, tmp_path):
    plan = planned(num_devices=num_devices)
    text = plan.save(tmp_path / "plan.html").read_text()
    parts = [part for part in PARTS if part != "gathered" or num_devices > 1]
    for part in parts:
        assert text.count(f"<td class=part data-name={part}>") == len(plan.rows)
    assert text.count("<td class=peak>") == text.count("<div class=parts>") == len(plan.rows)
    assert text.count(plan.rows[0].place) == len(plan.rows)


def test_a_limit_that_is_not_drawn_is_not_spoken_of(tmp_path):
    near, far = (planned(memory).save(tmp_path / f"{memory}.html").read_text() for memory in (10**11, 10**13))
    assert "The red line is the memory that there is, 100 GB." in near and near.count('class="limit"') == 8
    assert "red line" not in far and 'class="limit"' not in far
