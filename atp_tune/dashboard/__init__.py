"""What Optuna's dashboard shows of a study: a note, figures, columns and files."""
