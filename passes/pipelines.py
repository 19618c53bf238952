"""The pipelines: which passes run, in which order, and why in this order."""

from __future__ import annotations

from fxopt.passes.canonicalize import CANONICALIZE
from fxopt.passes.cleanup import CLEANUP
from fxopt.passes.fuse_add_norm import FUSE_ADD_NORM
from fxopt.passes.fuse_embedding import FUSE_EMBEDDING
from fxopt.passes.fuse_glu import FUSE_GLU
from fxopt.passes.fuse_layer_norm import FUSE_LAYER_NORM
from fxopt.passes.fuse_linear_cross_entropy import FUSE_LINEAR_CROSS_ENTROPY
from fxopt.passes.fuse_linear_log_prob import FUSE_LINEAR_LOG_PROB
from fxopt.passes.fuse_relu_squared import FUSE_RELU_SQUARED
from fxopt.passes.fuse_rms_norm import FUSE_RMS_NORM
from fxopt.passes.fuse_rope import FUSE_ROPE
from fxopt.passes.join_parts import JOIN_PARTS
from fxopt.passes.recognize_functions import RECOGNIZE_FUNCTIONS
from fxopt.passes.remove_casts import REMOVE_CASTS
from fxopt.passes.restore_causal_attention import RESTORE_CAUSAL_ATTENTION
from fxopt.passes.separate_logits import SEPARATE_LOGITS
from fxopt.passes.share_key_value_heads import SHARE_KEY_VALUE_HEADS
from fxopt.passes.skip_masked_keys import SKIP_MASKED_KEYS
from fxopt.rewrite.pipeline import Pipeline

EXACT = Pipeline(
    (
        CANONICALIZE,  # first: everything after it expects one spelling for each operation
        JOIN_PARTS,  # before the fusions, which leave alone what is written to
        SEPARATE_LOGITS,  # before the loss is fused: the loss must be the only reader of its logits
        REMOVE_CASTS,  # before the fusions, whose patterns are written without redundant casts
        RECOGNIZE_FUNCTIONS,  # before the fusions, whose patterns call them
        FUSE_EMBEDDING,
        FUSE_LAYER_NORM,  # before the next, which would find the norm of the centered rows in it
        FUSE_RMS_NORM,
        FUSE_ROPE,  # before the next, which would take the sum in it for a residual one
        FUSE_ADD_NORM,  # after the norms, which it reads
        FUSE_GLU,
        FUSE_RELU_SQUARED,
        FUSE_LINEAR_CROSS_ENTROPY,
        FUSE_LINEAR_LOG_PROB,  # after the loss, whose rules cut off rows before the head
        RESTORE_CAUSAL_ATTENTION,  # before the clean-up, which then drops the mask that nobody reads
        SHARE_KEY_VALUE_HEADS,  # after the masks are gone
        SKIP_MASKED_KEYS,  # after both: it takes what is left with a mask, over as few heads as can be
        CLEANUP,  # last: also takes back what SEPARATE_LOGITS copied, if the loss was not fused
    )
)
