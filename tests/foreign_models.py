"""Two models whose code is not transformers', as `trust_remote_code` and research repositories have them."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutput

VOCABULARY, WIDTH, HEADS, LAYERS = 97, 64, 4, 2


class NanoGPTBlock(nn.Module):
    def __init__(self):
        super().__init__()
        self.ln_1, self.ln_2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.attention, self.project = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.expand, self.contract = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, x):
        B, T, C = x.shape
        q, k, v = self.attention(self.ln_1(x)).split(C, dim=2)
        q, k, v = (t.view(B, T, HEADS, C // HEADS).transpose(1, 2) for t in (q, k, v))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.project(y.transpose(1, 2).contiguous().view(B, T, C))
        return x + self.contract(F.gelu(self.expand(self.ln_2(x))))


class NanoGPT(nn.Module):
    """No config, `forward(idx, targets)`, labels already shifted, -1 for no label, a tuple (logits, loss)."""

    def __init__(self):
        super().__init__()
        self.tokens, self.positions = nn.Embedding(VOCABULARY, WIDTH), nn.Embedding(128, WIDTH)
        self.blocks = nn.ModuleList(NanoGPTBlock() for _ in range(LAYERS))
        self.ln_f, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, VOCABULARY, bias=False)

    def forward(self, idx, targets=None):
        x = self.tokens(idx) + self.positions(torch.arange(idx.shape[1], device=idx.device))
        for block in self.blocks:
            x = block(x)
        logits = self.head(self.ln_f(x))
        if targets is None:
            return logits, None
        return logits, F.cross_entropy(logits.view(-1, VOCABULARY), targets.view(-1), ignore_index=-1)


class RemoteConfig(PretrainedConfig):
    model_type = "remote"

    def __init__(self, vocab_size=VOCABULARY, hidden_size=WIDTH, **kwargs):
        self.vocab_size, self.hidden_size = vocab_size, hidden_size
        super().__init__(**kwargs)


class ScaleNorm(nn.Module):
    """A norm that no rule knows: x / |x| * g."""

    def __init__(self):
        super().__init__()
        self.g = nn.Parameter(torch.tensor(8.0))

    def forward(self, x):
        return x / x.norm(dim=-1, keepdim=True).clamp(min=1e-5) * self.g


class RemoteModel(PreTrainedModel):
    """A loss of its own: shifted logits and a penalty on confidence. It looks at values, and counts its calls."""

    config_class = RemoteConfig

    def __init__(self, config):
        super().__init__(config)
        self.embed = nn.Embedding(config.vocab_size, config.hidden_size)
        self.norm, self.mixer = ScaleNorm(), nn.Conv1d(config.hidden_size, config.hidden_size, 4, padding=3)
        self.gate, self.up = (nn.Linear(config.hidden_size, 96, bias=False) for _ in range(2))
        self.down = nn.Linear(96, config.hidden_size, bias=False)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size)
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64))
        self.post_init()

    def forward(self, input_ids, labels=None, attention_mask=None):
        self.calls += 1
        hidden = self.mixer(self.embed(input_ids).transpose(1, 2))[..., : input_ids.shape[1]].transpose(1, 2)
        if hidden.isnan().any():
            raise FloatingPointError("the mixer yields nan")
        hidden = self.norm(hidden)
        hidden = hidden + self.down(F.silu(self.gate(hidden)) * self.up(hidden))
        logits = self.lm_head(hidden)
        loss = None
        if labels is not None:
            shifted = logits[..., :-1, :].contiguous()
            losses = F.cross_entropy(shifted.view(-1, shifted.size(-1)), labels[..., 1:].reshape(-1), reduction="none")
            confidence = shifted.float().softmax(-1).square().sum(-1).view(-1)
            loss = (losses + 0.1 * confidence).mean()
        return CausalLMOutput(loss=loss, logits=logits)


def tokens(rows: int = 3, length: int = 17, seed: int = 0) -> Tensor:
    return torch.randint(0, VOCABULARY, (rows, length), generator=torch.Generator().manual_seed(seed))
