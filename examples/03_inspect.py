"""See before you train: what fxopt would do to a model, from its configuration alone, and what a change would cost.

A small configuration keeps this to seconds; put "meta-llama/Llama-3.1-70B" in its place, which takes less than a minute
and less than a gigabyte.
"""

import tempfile
from pathlib import Path

from transformers import LlamaConfig

import fxopt
from fxopt.inspection.compare import Comparison, Condition
from fxopt.passes.pipelines import EXACT

config = LlamaConfig(
    vocab_size=32_000,
    hidden_size=1024,
    intermediate_size=2816,
    num_hidden_layers=4,
    num_attention_heads=16,
    num_key_value_heads=4,
)
diff = fxopt.inspect(config, "bf16", batch_size=2, sequence_length=1024)
print(diff)  # like a `git diff` of the model's own source
print(diff.metrics)

(graph,) = diff.graphs
for hunks in graph.folded_hunks():
    first = hunks[0]
    if first.rewrites and first.before is not None and first.after is not None and first.source is not None:
        saved = len(hunks) * (first.before.saved_bytes - first.after.saved_bytes)
        ops = ", ".join(graph.rewrites[number].op for number in first.rewrites)
        print(f"{ops} × {len(hunks)}, from {first.source.place}: {saved / 1e6:.1f} MB less kept for backward")

# The same without one pass, as a test in CI would compare two versions: `fxopt diff A.json B.json --fail-if …`.
other = fxopt.inspect(config, "bf16", batch_size=2, sequence_length=1024, pipeline=EXACT.without("fuse_glu"))
lost = Comparison(diff, other).lost()
assert {text.split()[0] for text in lost} == {"swiglu"}, lost
assert Condition.parse("saved_bytes > 5 %").holds(diff.metrics, other.metrics)

folder = Path(tempfile.mkdtemp())
for name in ("diff.html", "diff.json", "diff.txt", "diff.graphml", "diff.model-explorer.json"):
    print("wrote", diff.save(folder / name))
