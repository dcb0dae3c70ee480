"""Scoring: what a model answers, with and without an adapter, and how good that is.

    squad     the official SQuAD v1.1 and v2.0 scores of a predictions file
    answer    who answers: a model with or without an adapter, or recorded predictions; and what an evaluation found
    report    the evaluation as HTML
    cli       `fwdllama eval` and `fwdllama score`

`bench` measures training itself and is no part of the product's run.
"""
