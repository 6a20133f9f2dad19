"""Few-shot adaptation of CLIP models: data, recipe, evaluation, prediction."""
