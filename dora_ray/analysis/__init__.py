"""Statistics of videos, as the Walking Tours data set's paper gives them: light over time, and changes of shot."""
