"""Measurements, which `bench/results` keeps by their dates.

Speed: `stages`, `limits`, `savings`, `peers`, `crop`, `export`, `curate`, and on a GPU `gpu`. Answers:
`accuracy`, of what `questions` reads, `answers` keeps and `scorers` judges; `scenes` are drawn questions,
over which `gate` and `rules` run. `harness` times and describes; `compare` and `readme` read results.
"""
