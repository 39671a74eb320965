"""Training: drawn scenes in Visual Genome's format, their dialogues, and the recipe of the built-in model.

Reading order: ``scenes`` (pictures with annotations), ``curate`` (a picture's annotations to dialogues),
``visual_genome`` (the annotations' files) and ``dataset`` (from those files to a data set),
``nano`` (the model and its tokenizer), ``recipe`` (how it is trained).
"""
