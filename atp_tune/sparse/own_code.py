"""The code in a slim folder: always that of this package, since the folder's card tells people to trust it."""

import json
import shutil
from pathlib import Path

from atp_tune.checkpoints.trust import CODE, read_table
from atp_tune.packed import modeling_atp_slim
from atp_tune.packed.modeling_atp_slim import LANGUAGE, checked_table, places

OURS = Path(modeling_atp_slim.__file__)
CONFIG = "config.json"
NAMING = ("auto_map", "custom_pipelines")  # keys by which transformers finds code, in this folder or in another


def bring_own_code(folder: Path) -> None:
    """Puts the modelling file into a slim folder that was copied, and names it alone.

    All other Python files go, and what names code: of the model, its tokenizer and its processors.
    """
    for file in folder.glob(CODE):
        file.unlink()
    shutil.copyfile(OURS, folder / OURS.name)
    for file in folder.glob(f"*{CONFIG}"):  # also tokenizer_config.json and those of processors
        table = read_table(file)
        kept = {key: value for key, value in table.items() if key not in NAMING}
        if file.name == CONFIG:
            kept["auto_map"] = places(checked_table(table).get("class", LANGUAGE))
        if kept != table:
            file.write_text(json.dumps(kept, indent=2) + "\n", encoding="utf-8")
