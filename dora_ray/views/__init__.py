"""What the network sees of a clip: crops, colors, blur."""
