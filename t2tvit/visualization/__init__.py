"""What the layers of a model compute for images, as PNGs and a page."""
