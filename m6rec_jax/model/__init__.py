"""The Transformer. Dims: B batch, T query positions, S key positions, D model, N layers, H heads, K kv heads,
G query heads a kv head, h head dim, F ffn, V vocab, L code levels, M beams, C catalogue."""
