"""The page in a real browser: it loads, folds, filters, shows; its numbers are the JSON's; no name in it is run."""

import re
from collections.abc import Iterator
from dataclasses import replace
from functools import reduce
from pathlib import Path
from typing import Any

import pytest
from transformers import LlamaConfig

import fxopt
from fxopt.inspection.diff import GraphDiff
from fxopt.inspection.numbers import change, in_bytes, in_count, in_flops
from tests.tiny_models import SIZES

pytestmark = pytest.mark.xdist_group("browser")

HOSTILE = '</script><script>window.hacked = true</script><img src="x" onerror="window.hacked = true">&lt;b>${1}'
FORMATS = {
    "bytes": in_bytes,
    "flops": in_flops,
    "count": in_count,
    "plain": str,
    # JavaScript writes 4.2e-3 where Python writes 4.2e-03.
    "error": lambda number: f"{number:.1e}".replace("e-0", "e-").replace("e+0", "e+"),
}


@pytest.fixture
def opened(browser, tmp_path) -> Iterator[Any]:
    """A function that opens the page of a diff; afterwards nothing may have been complained of or asked for."""
    complaints: list[str] = []
    pages: list[Any] = []

    def open_page(diff: GraphDiff, **options: Any) -> Any:
        path = diff.save(tmp_path / "diff.html")
        page = browser.new_page(viewport={"width": 1500, "height": 900}, **options)
        pages.append(page)
        page.on("console", lambda message: complaints.append(message.text))
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on("dialog", lambda dialog: complaints.append(dialog.message))
        page.on("request", lambda request: request.url == path.as_uri() or complaints.append(request.url))
        page.goto(path.as_uri())
        page.wait_for_selector("#canvas .head")
        return page

    yield open_page
    for page in pages:
        page.close()
    assert complaints == []


def _settled(page: Any) -> Any:
    page.evaluate("() => new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(done)))")
    return page


def test_it_shows_the_model_and_what_changed(opened, diff):
    page = opened(diff)
    assert page.inner_text("#model") == diff.model
    assert page.locator(".card").count() == 7
    (graph,) = diff.graphs
    shown = {hunks[0].like for hunks in graph.folded_hunks() if hunks[0].rewrites}
    assert page.locator(".item").count() == len(shown)
    assert page.inner_text("#tab-rewrites") == f"rewrites {len(graph.rewrites)}"


def test_the_list_adds_up_to_its_headline(opened, diff):
    page = opened(diff)
    (graph,) = diff.graphs
    assert any(len(hunk.rewrites) > 1 for hunk in graph.hunks)  # of which the headline counts each
    assert _listed(page) == int(page.inner_text("#tab-rewrites").split()[-1]) == len(graph.rewrites)
    by_pass = page.locator("#passes .number").all_inner_texts()
    assert sum(int(text) for text in by_pass if text) == len(graph.rewrites)
    assert "2 rewrites in each of 3 places" in page.inner_text("#list")
    page.fill("#search", "add_rms_norm")
    assert 0 < _listed(page) == int(page.inner_text("#tab-rewrites").split()[-1]) < len(graph.rewrites)


def _listed(page: Any) -> int:
    return sum(int(text.removeprefix("× ")) for text in page.locator("#list .times").all_inner_texts())


def test_an_operation_with_several_results_shows_each(opened, diff):
    page = opened(diff)
    page.locator(".item", has_text="add_rms_norm").first.click()
    drawn = page.locator("#canvas .cell", has_text="add_rms_norm").first.text_content()
    assert drawn.endswith("2 × bfloat16[2, 33, 64]")
    page.locator("#details td button", has_text="add_rms_norm").first.click()
    fact = page.locator("#details tr", has_text="2 results").locator("td.wide")
    assert fact.inner_text().splitlines() == ["bfloat16[2, 33, 64]"] * 2
    assert "33.8 kB" not in page.locator("#details tr", has_text="size").inner_text()  # that is 2 of float32
    assert "16.9 kB" in page.locator("#details tr", has_text="size").inner_text()


def test_each_graph_tells_its_call(opened, diff):
    (graph,) = diff.graphs
    evaluation = replace(graph, call="evaluation, 1 × 40 tokens", runs=3)
    page = opened(replace(diff, graphs=(graph, evaluation)))
    assert "training, 2 × 33 tokens" in page.inner_text("#call")
    page.select_option("#graph", "1")
    assert "evaluation, 1 × 40 tokens" in page.inner_text("#call")
    assert "run 3 times" in page.locator("#graph option").nth(1).inner_text()
    page.locator(".item").first.click()
    assert "cost of one run of this graph" in page.inner_text("#details").lower()


def _numbers(page: Any) -> list[tuple[str, str, str]]:
    described = "[e.dataset.keys, e.dataset.format, e.textContent]"
    return page.evaluate(f"() => [...document.querySelectorAll('[data-keys]')].map((e) => {described})")


def _at(data: Any, key: str) -> Any:
    return reduce(
        lambda value, name: value[int(name)] if isinstance(value, list) else value[name], key.split("."), data
    )


def _sum(data: Any, keys: str) -> Any:
    return sum(_at(data, key) for key in keys.split("+"))


def test_every_number_is_the_json_s(opened, diff):
    page, data = opened(diff), diff.to_dict()
    seen: dict[str, tuple[str, str]] = {}
    for card in page.locator(".card").all():
        card.click()
        seen |= {keys: (form, text) for keys, form, text in _numbers(page)}
    for index in range(page.locator(".item").count()):
        page.locator(".item").nth(index).click()
        seen |= {keys: (form, text) for keys, form, text in _numbers(page)}
        for operation in page.locator("#details td button").all()[:3]:
            operation.click()
            seen |= {keys: (form, text) for keys, form, text in _numbers(page)}
            page.locator(".item").nth(index).click()
    assert len(seen) > 150
    for keys, (form, text) in seen.items():
        assert text == FORMATS[form](_sum(data, keys)), keys
    changes = page.evaluate(
        "() => [...document.querySelectorAll('[data-change]')].map((e) => [e.dataset.change, e.textContent])"
    )
    assert len(changes) == 7
    for keys, text in changes:
        before, after = keys.split("|")
        assert text == change(_sum(data, before), _sum(data, after))


def test_heads_say_what_stands_below_them(opened, diff):
    """The numbers in the drawing, which are added from nodes."""
    page = opened(diff)
    (graph,) = diff.graphs
    blocks = [block for block in graph.blocks if block.path == "model.layers.1"]
    nodes = [graph.nodes[number] for number in blocks[0].nodes]
    before, after = (
        sum(getattr(node, side).saved_bytes for node in nodes if getattr(node, side)) for side in ("before", "after")
    )
    counts = [sum(getattr(node, side) is not None for node in nodes) for side in ("before", "after")]
    head = page.locator(f'.head[data-block="{blocks[0].index}"]').text_content()
    assert f"{counts[0]} → {counts[1]} operations · keeps {in_bytes(before)} → {in_bytes(after)}" in head


def test_layers_fold_and_unfold(opened, diff):
    page = opened(diff)
    page.keyboard.press("e")  # everything open
    page.keyboard.press("e")  # everything closed
    folded = _settled(page).locator(".head").count()
    page.click("#unfold")
    assert _settled(page).locator(".head").count() == folded + 2  # of three equal layers, one was shown
    assert page.locator(".head", has_text="model.layers.3").count() == 1
    page.click("#unfold")
    assert _settled(page).locator(".head").count() == folded
    assert page.locator(".head", has_text="model.layers.3").count() == 0
    head = page.locator(".head", has_text="model.layers.0").first
    nodes = page.locator(".cell").count()
    head.click()
    assert _settled(page).locator(".cell").count() > nodes
    page.locator(".head", has_text="model.layers.0").first.focus()
    page.keyboard.press("Enter")
    assert _settled(page).locator(".cell").count() == nodes


def test_passes_filter_the_rewrites(opened, diff):
    page = opened(diff)
    before = page.locator(".item").count()
    rope = page.locator(".item", has_text="rope").count()
    assert rope > 0
    page.locator('[data-step="fuse_rope"] input').uncheck()
    assert page.locator(".item").count() == before - rope
    assert _settled(page).locator(".cell.faded").count() > 0
    page.locator('[data-step="fuse_rope"] input').check()
    assert page.locator(".item").count() == before


def test_search_finds_source_and_operations(opened, diff):
    page = opened(diff)
    titles = page.locator(".item .top span:first-child")
    for text in ("rsqrt", "hidden_states.pow(2)"):  # an operation, and a line of source other than the hunk's own
        page.fill("#search", text)
        assert set(titles.all_inner_texts()) == {"rms_norm", "add_rms_norm"}
    place = page.locator(".item .under").first.inner_text().rpartition(", ")[2]
    page.fill("#search", place)
    assert re.fullmatch(r"\w+\.py:\d+", place) and titles.count() > 0
    assert _settled(page).locator(".band").count() > 0
    page.fill("#search", "nothing is called this")
    assert "no rewrite" in page.inner_text("#list")
    assert _settled(page).locator(".band").count() == 0


def test_in_a_narrow_window_a_click_shows_the_rewrite(opened, diff):
    page = opened(diff)
    page.set_viewport_size({"width": 420, "height": 760})
    assert page.evaluate("document.documentElement.scrollWidth") <= 420
    page.locator(".item", has_text="swiglu").click()
    assert 0 <= page.locator("#details h3").bounding_box()["y"] < 700


# In pixels of the page: boxes that a finger or an eye needs, and everything that sticks out of the window.
LOOK = """() => {
  const box = (e) => e.getBoundingClientRect();
  const all = (s) => [...document.querySelectorAll(s)].filter((e) => box(e).width);
  const named = (e) => e.id || e.textContent;
  const hides = (e) => e.scrollWidth > e.clientWidth && getComputedStyle(e).overflowX !== "visible";
  const clips = (e) => e && (hides(e) || clips(e.parentElement));
  const sticksOut = (e) => box(e).left < 0 || box(e).right > innerWidth + 0.5;
  const isSmall = (e) => box(e).height < 36 || box(e).width < 44;
  return {
    width: document.documentElement.scrollWidth,
    cards: all(".card").map((e) => box(e).width),
    canvas: box(document.getElementById("canvas")).toJSON(),
    letters: 12 * view.zoom,
    outside: all("[data-keys], .less, button, input, select, th, .times").filter(sticksOut).map(named),
    clipped: all("[data-keys], .less, .times").filter(clips).map(named),
    small: all("button, select, summary, input[type=search]").filter(isSmall).map(named),
  };
}"""


@pytest.mark.parametrize("width", [360, 480, 500, 768, 1024, 1200, 1920])
def test_everything_is_in_sight_and_large_enough(opened, diff, width):
    (graph,) = diff.graphs
    name = "an-organization/a-model-with-a-long-name-without-any-space-in-it-7B-instruct"
    page = opened(replace(diff, model=name, graphs=(graph, replace(graph, call="evaluation, 1 × 40 tokens", runs=3))))
    page.set_viewport_size({"width": width, "height": 740})
    _looks_right(page, width)
    page.click("#mode")  # two columns if there was one, and the other way round
    _looks_right(page, width)
    for kind in ("add_rms_norm", "grouped_query_attention"):
        page.locator(".item", has_text=kind).first.click()
        _looks_right(page, width)
        page.locator("#details td button").last.click()
        _looks_right(page, width)


def _looks_right(page: Any, width: int) -> None:
    found = _settled(page).evaluate(LOOK)
    assert found["width"] <= width
    assert found["outside"] == found["clipped"] == []
    assert len(found["cards"]) == 7 and min(found["cards"]) >= (140 if width <= 768 else 80)
    assert found["canvas"]["height"] >= 300 and found["canvas"]["width"] >= min(width, 360)
    assert found["letters"] >= 9
    if width <= 768:
        assert found["small"] == []
        assert found["canvas"]["width"] == width


def test_the_drawing_follows_the_width_of_the_window(opened, diff):
    page = opened(diff)
    assert page.locator(".band").count() > 0
    page.set_viewport_size({"width": 500, "height": 900})
    assert _settled(page).locator(".band").count() == 0  # overlaid: two columns would be too small
    assert page.inner_text("#mode") == "side by side"
    page.click("#mode")
    assert _settled(page).locator(".band").count() > 0
    page.set_viewport_size({"width": 480, "height": 900})
    assert _settled(page).locator(".band").count() > 0  # as it was asked for


def test_a_rewrite_shows_its_source_proof_and_bytes(opened, diff):
    page = opened(diff)
    (graph,) = diff.graphs
    hunk = next(hunk for hunk in graph.hunks if any(graph.rewrites[r].op == "swiglu" for r in hunk.rewrites))
    page.locator(".item", has_text="swiglu").click()
    text = page.inner_text("#details")
    for number in hunk.removed:
        source = graph.nodes[number].source
        assert (source.code if source.file == hunk.source.file else f"{source.place}: {source.code}") in text
    assert f"{hunk.source.file}:{hunk.source.line}" in text
    assert f"swiglu({graph.nodes[hunk.added[0]].arguments})" in text
    assert FORMATS["error"](graph.rewrites[hunk.rewrites[0]].proof.replacement_error) in text
    assert in_bytes(hunk.before.saved_bytes) in text and "4 places" in text
    assert _settled(page).locator(".cell.chosen").count() == len(hunk.removed) + len(hunk.added)


def test_a_click_in_the_graph_selects(opened, diff):
    page = opened(diff)
    page.locator(".band").first.click(force=True)
    assert "proof" in page.inner_text("#details")
    page.locator(".cell", has_text="linear").first.click()
    assert "what it is" in page.inner_text("#details")
    assert _settled(page).locator(".wire.chosen").count() > 0


def test_keys(opened, diff):
    page = opened(diff)
    page.keyboard.press("j")
    first = page.inner_text("#details h3")
    page.keyboard.press("j")
    assert page.locator('.item[aria-current="true"]').count() == 1
    page.keyboard.press("k")
    assert page.inner_text("#details h3") == first
    page.keyboard.press("/")
    page.keyboard.type("jo")
    assert page.input_value("#search") == "jo"
    page.keyboard.press("Escape")
    page.keyboard.press("?")
    assert page.locator("#keys").is_visible()


def test_overlaid_side_by_side_and_zoom(opened, diff):
    page = opened(diff)
    assert page.locator(".band").count() > 0
    page.keyboard.press("o")
    assert _settled(page).locator(".band").count() == 0
    assert page.locator(".cell .came").count() > 0 and page.locator(".cell .gone").count() > 0
    transform = page.get_attribute("#canvas > g", "transform")
    page.keyboard.press("+")
    assert _settled(page).get_attribute("#canvas > g", "transform") != transform


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_light_and_dark(opened, diff, scheme):
    page = opened(diff, color_scheme=scheme)
    brightness = "() => Math.max(...getComputedStyle(document.body).backgroundColor.match(/\\d+/g).map(Number))"
    assert (page.evaluate(brightness) > 128) == (scheme == "light")
    page.keyboard.press("t")
    assert (page.evaluate(brightness) > 128) == (scheme == "dark")


def test_near_misses_are_listed(opened, diff):
    from fxopt.inspection.diff import Miss

    (graph,) = diff.graphs
    miss = Miss(
        "FuseSomething",
        "fuse_something",
        graph.before[5],
        "file.py:1: code",
        "model",
        "the weight is odd",
        refused=False,
    )
    page = opened(replace(diff, graphs=(replace(graph, misses=(miss, miss)),)))
    page.click("#tab-misses")
    assert "× 2" in page.inner_text("#list") and "the weight is odd" in page.inner_text("#list")
    page.locator(".item").click()
    assert "nearly matched" in page.inner_text("#details")


def test_names_are_text_and_never_run(opened, diff):
    (graph,) = diff.graphs
    source = replace(graph.nodes[0].source, code=HOSTILE, function=HOSTILE, file=HOSTILE)
    nodes = tuple(
        replace(
            node, name=HOSTILE, operation=HOSTILE, spelled=HOSTILE, arguments=HOSTILE, module=HOSTILE, source=source
        )
        for node in graph.nodes
    )
    rewrites = tuple(
        replace(rewrite, op=HOSTILE, rule=HOSTILE, step=rewrite.step + HOSTILE) for rewrite in graph.rewrites
    )
    hunks = tuple(
        replace(hunk, source=source, module=HOSTILE, steps=tuple(step + HOSTILE for step in hunk.steps))
        for hunk in graph.hunks
    )
    stages = tuple(replace(stage, name=stage.name + HOSTILE, peak_at=HOSTILE) for stage in graph.stages)
    blocks = tuple(replace(block, path=HOSTILE) for block in graph.blocks)
    hostile = replace(graph, nodes=nodes, rewrites=rewrites, hunks=hunks, stages=stages, blocks=blocks)
    page = opened(replace(diff, model=HOSTILE, policy=HOSTILE, graphs=(hostile,), graph_breaks={HOSTILE: 1}))
    assert page.inner_text("#model") == HOSTILE
    assert HOSTILE in page.title()
    page.keyboard.press("e")
    assert page.locator(".item").count() > 0
    for item in page.locator(".item").all()[:3]:
        item.click()
        assert HOSTILE in page.inner_text("#details")
    page.locator("#details td button").first.click()
    assert HOSTILE in page.inner_text("#details .code")
    assert page.evaluate("() => window.hacked") is None
    assert page.locator("img").count() == 0 and page.locator("script").count() == 2


def test_no_graph_at_all(browser, diff, tmp_path):
    page = browser.new_page()
    page.goto(replace(diff, graphs=(), fallbacks={"it looks at values": 1}).save(tmp_path / "none.html").as_uri())
    assert "it looks at values" in page.inner_text("#details")
    page.close()


@pytest.mark.slow
def test_eighty_layers_move_smoothly(opened):
    page = opened(fxopt.inspect(LlamaConfig(**SIZES | {"num_hidden_layers": 80}), sequence_length=32, prove=False))
    page.keyboard.press("f")
    page.keyboard.press("e")
    _settled(page)
    assert page.locator("#canvas *").count() < 4000  # only what is in sight
    milliseconds = page.evaluate(
        """async () => {
          const frame = () => new Promise(requestAnimationFrame), times = [];
          for (let i = 0; i < 60; i += 1) {
            const start = performance.now();
            document.getElementById("canvas").dispatchEvent(new WheelEvent("wheel", { deltaY: 300 }));
            await frame();
            times.push(performance.now() - start);
          }
          return times.sort((a, b) => a - b)[30];
        }"""
    )
    assert milliseconds < 100
    print(f"median frame {milliseconds:.0f} ms")


def test_the_page_asks_for_nothing(diff, tmp_path: Path):
    text = diff.save(tmp_path / "diff.html").read_text()
    assert text.count("<script") == 2 and "http://" not in text.replace("http://www.w3.org/2000/svg", "")
    assert "default-src 'none'" in text
