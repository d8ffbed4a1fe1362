"""Images for training and evaluation."""

from t2tvit.data.images import load_image
from t2tvit.data.sources import SOURCES, Split, channels_of, open_split

__all__ = ["SOURCES", "Split", "channels_of", "load_image", "open_split"]
