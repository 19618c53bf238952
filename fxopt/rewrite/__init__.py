"""The rewrite engine: graphs, patterns, proofs and pipelines. It knows no particular rewrite."""
