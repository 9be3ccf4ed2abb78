"""Parts that let a run survive kills, drains and resizes: requests, the controller's callback, spares."""
