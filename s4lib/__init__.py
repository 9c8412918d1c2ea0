"""s4lib: semi-supervised semantic segmentation, the library behind the book.

Start at `method.py` for the words, `methods/` for the algorithms, `trainer.py` for the loop.
"""

import warnings

# timm imports tqdm's notebook bar, which asks for widgets; our progress (progress.py) needs none.
warnings.filterwarnings("ignore", message="IProgress not found")
