"""Training: Visual Genome's annotations to dialogues, fine-tuning on them, and the built-in model's recipe.

Reading order: ``scenes`` (drawn pictures with annotations), ``curate`` (a picture's annotations to
dialogues), ``visual_genome`` (the annotations' files) and ``dataset`` (from those files to a data set);
``samples`` (what of a data set a model is fed), ``loop`` (what every training runs in) and ``finetune`` (a
LLaVA's); ``nano`` (the built-in model and its tokenizer) and ``recipe`` (how it is trained).
"""
