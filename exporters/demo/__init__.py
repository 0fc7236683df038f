"""`melora-fx demo`: trains, folds, exports and times one model on texts."""
