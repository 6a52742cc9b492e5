"""Notes, figures, columns and files of a study for Optuna's dashboard."""
