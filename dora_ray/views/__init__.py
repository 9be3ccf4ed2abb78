"""Views of a clip: crops, colors, blur."""
