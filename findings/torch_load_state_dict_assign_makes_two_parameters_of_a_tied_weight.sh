#!/usr/bin/env bash
# PyTorch 2.13.0, 2.14.1: `load_state_dict(..., assign=True)` makes two Parameters of a tied weight that still share
# their memory: the optimizer works on the one weight twice a step, and each time with a part of the gradient.
#
# An embedding and a head that hold one Parameter; the model's own state dict goes through torch.save and torch.load
# and back in. Expected: the model stays tied, one Parameter, as without assign; or it comes apart in two weights.
# Seen: two Parameters with one data pointer. The forward pass is that of the tied model, and the weights stay equal,
# so a check by value or a look at the logits finds nothing; but parameters() counts the weight twice, the gradients
# are apart, their norm for clipping is another, and weight decay shrinks the weight twice: 0.81 instead of 0.9 of it
# after a step with lr 1 and decay 0.1.
# The documentation of `assign` says that the properties of the dict's tensors are kept and nothing of tied weights.
# A model built on the meta device and loaded with assign=True is the common way to load without a copy.
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 numpy
cat > "$folder/show.py" <<'PYTHON'
import io

import torch


class Tied(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = torch.nn.Embedding(5, 3)
        self.head = torch.nn.Linear(3, 5, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, tokens):
        return self.head(self.embedding(tokens))


def look(assign):
    torch.manual_seed(0)
    model = Tied()
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    if assign:
        with torch.device("meta"):
            model = Tied()
    model.load_state_dict(torch.load(file), assign=assign)
    head, embedding = model.head.weight, model.embedding.weight
    assert head.data_ptr() == embedding.data_ptr()
    tokens = torch.arange(5)
    torch.nn.functional.cross_entropy(model(tokens), tokens).backward()
    norm = torch.nn.utils.get_total_norm([p.grad for p in model.parameters()]).item()
    before = head.detach().clone()
    for parameter in model.parameters():
        parameter.grad.zero_()
    torch.optim.AdamW(model.parameters(), lr=1.0, weight_decay=0.1).step()
    assert torch.equal(head, embedding)
    kept = (head.detach() / before).mean().item()
    print(f"assign={assign}: {len(list(model.parameters()))} parameters, one object: {head is embedding}, norm of the")
    print(f"  gradients {norm:.4f}, a step with weight decay 0.1 leaves {kept:.2f} of the weight")
    return len(list(model.parameters())), norm, round(kept, 4)


print(torch.__version__)
tied, assigned = look(assign=False), look(assign=True)
assert tied[0] == 1 and tied[2] == 0.9
assert assigned[0] == 2 and assigned[2] == 0.81 and abs(assigned[1] - tied[1]) > 0.01, "not as it was seen"
PYTHON
"$folder/venv/bin/python" "$folder/show.py"
