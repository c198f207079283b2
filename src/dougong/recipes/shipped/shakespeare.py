"""Characters of Shakespeare: the field's yardstick (nanoGPT's), in ten seconds and in minutes.

Both want `data.path` to name the text (1,115,394 characters; nanoGPT's `data/shakespeare_char` says where it is had)
and divide it as nanoGPT does: the first 90 % of characters for training, the rest for validation.
"""

from dougong.recipes.recipe import SampleConfig

_SAMPLE = SampleConfig(prompts=("ROMEO:\n", "First Citizen:\n"), tokens=300)
