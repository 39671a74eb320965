"""Measurements, which `bench/results` keeps by their dates.

Speed: `stages`, `limits`, `savings`, `peers`, `crop`, `export`, `curate`, and on a GPU `gpu`. Answers:
`accuracy` asks what `questions` reads, `answers` keeps what was said, `scorers` judge it; `scenes` are drawn,
and asked by `gate` and `rules` too. `harness` times and describes; `compare` and `readme` read results.
"""
