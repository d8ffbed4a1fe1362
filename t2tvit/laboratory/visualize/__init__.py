"""``t2tvit visualize``: what the layers of a model make of an image, as PNGs and one page."""
