"""Training: drawn scenes in Visual Genome's format, their dialogues, and the recipe of the built-in model.

Reading order: ``scenes`` (pictures with annotations), ``curate`` (annotations to dialogues),
``nano`` (the model and its tokenizer), ``recipe`` (how it is trained).
"""
