"""What the layers of a model make of an image, as PNGs and one page."""
