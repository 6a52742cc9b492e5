"""lm-eval's model for questions about images: one that reads images beside text, with the processor of its folder.

lm-eval writes the model's image token into a question where the task has `<image>`; the processor turns it into as many
positions as an image takes. Whatever would let a model answer without its images is an error here.
"""

from pathlib import Path
from typing import Any

import torch
from lm_eval.models.hf_vlms import HFMultimodalLM

from atp_tune.checkpoints.classes import check_known, reads_images
from atp_tune.checkpoints.convert import one_line, quiet
from atp_tune.errors import UserError


def load_processor(folder: Path, trusted: bool, tasks: str) -> Any:
    """Loads the processor of a folder, with Pillow. `trusted`: code in the folder may run.

    UserError, which names the `tasks`, if the model reads no images or its processor cannot be loaded.
    """
    from transformers import AutoProcessor

    if not reads_images(folder):
        raise UserError(f"--tasks: {tasks} asks about images, and the model in {folder} reads text alone")
    try:
        with quiet("transformers"):
            found = AutoProcessor.from_pretrained(  # type: ignore[no-untyped-call]
                str(folder), local_files_only=True, trust_remote_code=trusted, backend="pil"
            )
    except Exception as error:  # processors raise many types, such as for a missing torchvision
        raise UserError(
            f"--tasks: {tasks} asks about images, and the processor in {folder} cannot be loaded: {one_line(error)}"
        ) from error
    if getattr(found, "tokenizer", None) is None or getattr(found, "image_processor", None) is None:
        raise UserError(f"--tasks: {tasks} asks about images, and {folder} has no processor of images beside text")
    return found


class ImageModel(HFMultimodalLM):  # type: ignore[misc]
    """lm-eval's model; UserError for a question whose images would not reach the model."""

    def _create_tokenizer(self, pretrained: Any, tokenizer: Any, *arguments: Any, **options: Any) -> None:
        """Takes the processor that is given as the tokenizer."""
        self.processor, self.tokenizer = tokenizer, tokenizer.tokenizer

    def tok_batch_multimodal_encode(
        self, strings: list[str], images: list[list[Any]], *arguments: Any, **options: Any
    ) -> Any:
        """Tokens and pixels of a batch of questions."""
        longest = options.pop("left_truncate_len", None)
        try:
            found = super().tok_batch_multimodal_encode(strings, images, *arguments, **options)
        except (ValueError, TypeError, IndexError, KeyError) as error:
            raise UserError(f"--tasks: the model's processor does not take a question: {one_line(error)}") from error
        ids = found["input_ids"]
        if longest is not None and ids.shape[1] > longest:
            raise UserError(
                f"--tasks: a question has {ids.shape[1]} tokens with its images, and {longest} fit beside the answer"
            )
        check_known(self.model, int(ids.max()), "evaluate")
        seen = (ids == self.image_token_id).any(1).tolist()
        if any(bool(own) and not there for own, there in zip(images, seen, strict=True)):
            raise UserError(
                f"--tasks: a question has an image, and the processor makes no image token ({self.image_token}) of it"
            )
        return found

    def _model_multimodal_generate(self, inputs: Any, *arguments: Any, **options: Any) -> torch.Tensor:
        with torch.inference_mode():
            found: torch.Tensor = super()._model_multimodal_generate(inputs, *arguments, **options)
        return found
