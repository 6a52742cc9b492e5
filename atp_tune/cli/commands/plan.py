"""Tells what a study will cost."""

from atp_tune.cli.options import Device, Json, Overrides, Storage, StudyLabel, StudyName, load_study


def plan(
    study: StudyName,
    json: Json = False,
    storage: Storage = None,
    study_name: StudyLabel = None,
    device: Device = None,
    set_: Overrides = None,
) -> None:
    """Tell what a study will cost, before anything long runs: tokens, seconds, memory, and what does not fit.

    The model is loaded, and a batch of each text goes through three blocks; nothing is stored. The keys of the JSON
    document are in `atp_tune/cost/forecast.py`.

    Example: `python tune.py plan --study smol`
    """
    from atp_tune.cli.running import run_plan

    run_plan(load_study(study, storage, device, set_), study_name, json)
