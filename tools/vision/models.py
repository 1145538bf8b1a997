"""Models that see, through transformers: detectors (Grounding DINO, OWLv2) and SAM 2.

Each is loaded once a process, at its start: where it is served (serve/tools.py), or in the run
itself if nobody serves it. What is not covered: several images in one forward pass.
"""

import functools
import importlib.util
import threading
from dataclasses import dataclass
from typing import TYPE_CHECKING

from run.config import UserError

if TYPE_CHECKING:
    from PIL.Image import Image

DETECTORS = ("grounding-dino", "mm-grounding-dino", "owlv2", "owlvit")  # config.model_type
TEXT_THRESHOLD = 0.25  # of Grounding DINO: which words of the labels a box is for
SAM_SIDE = 1024  # pixels: where the processor's file does not say another


@dataclass
class Found:
    """Something that a detector found."""

    label: str
    score: float  # 0 to 1
    box: tuple[float, float, float, float]  # left, top, right, bottom in pixels


def pick_device(device: str) -> str:
    """Picks the device of an option: auto is the GPU where there is one."""
    import torch

    if device != "auto":
        return device
    return "cuda" if torch.cuda.is_available() else "cpu"


@functools.cache
def load_detector(name: str, device: str) -> "Detector":
    """Loads the detector of this name or folder, on that device. Raises UserError."""
    from transformers import AutoConfig, AutoModelForZeroShotObjectDetection, AutoTokenizer

    config = _loaded(AutoConfig, name)
    if config.model_type not in DETECTORS:
        known = ", ".join(DETECTORS)
        raise UserError(f"{name!r} is a {config.model_type}: expected a detector ({known})")
    model = _loaded(AutoModelForZeroShotObjectDetection, name)
    tokenizer = _loaded(AutoTokenizer, name)
    processor = _image_processor(config.model_type, name)
    return Detector(model.to(pick_device(device)).eval(), tokenizer, processor)


@functools.cache
def load_segmenter(name: str, device: str) -> "Segmenter":
    """Loads SAM 2 of this name or folder, on that device. Raises UserError."""
    from transformers import AutoConfig, Sam2Model

    config = _loaded(AutoConfig, name)
    if config.model_type not in ("sam2", "sam2_video"):
        raise UserError(f"{name!r} is a {config.model_type}: expected a SAM 2, facebook/sam2.1-…")
    return Segmenter(_loaded(Sam2Model, name).to(pick_device(device)).eval())


def _loaded(kind, name):
    try:
        return kind.from_pretrained(name)
    except (OSError, ValueError) as error:
        why = " ".join(str(error).split())[:200]
        raise UserError(f"model {name!r} cannot be loaded: {why}") from None


def _image_processor(model_type, name):
    """Loads the image processor that resizes with PIL: it is the same, and needs no torchvision."""
    from transformers import GroundingDinoImageProcessorPil, Owlv2ImageProcessorPil

    if model_type in ("owlv2", "owlvit"):
        if importlib.util.find_spec("scipy") is None:  # with which it resizes
            raise UserError(f'model {name!r} needs scipy: pip install -e ".[see]"')
        return _loaded(Owlv2ImageProcessorPil, name)
    return _loaded(GroundingDinoImageProcessorPil, name)


class Detector:
    """Finds what a text names."""

    def __init__(self, model, tokenizer, processor):
        from transformers import GroundingDinoProcessor, Owlv2Processor

        self.model = model
        self.is_owl = model.config.model_type in ("owlv2", "owlvit")
        kind = Owlv2Processor if self.is_owl else GroundingDinoProcessor
        self.processor = kind(image_processor=processor, tokenizer=tokenizer)
        self._lock = threading.Lock()  # one forward pass at a time: memory stays bounded

    def __call__(self, image: "Image", labels: list[str], threshold: float) -> list[Found]:
        """Finds what is on an RGB image, the surest first."""
        import torch

        inputs = self.processor(text=[labels], images=image, return_tensors="pt")
        inputs = inputs.to(self.model.device)
        with self._lock, torch.inference_mode():
            outputs = self.model(**inputs)
        options = {"threshold": threshold, "target_sizes": [(image.height, image.width)]}
        if self.is_owl:
            options["text_labels"] = [labels]
        else:
            options["input_ids"] = inputs["input_ids"]
            options["text_threshold"] = TEXT_THRESHOLD
        (result,) = self.processor.post_process_grounded_object_detection(outputs, **options)
        found = []
        for label, score, box in zip(
            result["text_labels"], result["scores"].tolist(), result["boxes"].tolist(), strict=True
        ):
            left, top, right, bottom = box
            inside = (
                min(max(0.0, left), image.width),
                min(max(0.0, top), image.height),
                min(max(0.0, right), image.width),
                min(max(0.0, bottom), image.height),
            )
            found.append(Found(label, score, inside))
        return sorted(found, key=lambda each: -each.score)


class Segmenter:
    """Finds the outline of what is at a point or in a box."""

    def __init__(self, model):
        self.model = model
        self.side = getattr(model.config.vision_config.backbone_config, "image_size", None)
        if isinstance(self.side, list | tuple):
            self.side = self.side[0]
        self.side = self.side or SAM_SIDE
        self._lock = threading.Lock()

    def __call__(self, image: "Image", point=None, box=None):
        """Finds (mask, score): a boolean array (height, width), and how sure SAM is. point: (x, y),
        or box: (left, top, right, bottom), in pixels of the RGB image."""
        import numpy as np
        import torch
        from PIL import Image

        # 1. the image as its processor makes it, which would need torchvision
        size = (self.side, self.side)
        pixels = np.asarray(image.resize(size, Image.Resampling.BILINEAR), dtype=np.float32) / 255
        pixels = (pixels - np.array([0.485, 0.456, 0.406])) / np.array([0.229, 0.224, 0.225])
        device = self.model.device
        values = torch.tensor(pixels.transpose(2, 0, 1)[None], dtype=torch.float32, device=device)

        # 2. where to look, in pixels of that image
        across = self.side / image.width
        down = self.side / image.height
        where = {}
        if point is not None:
            place = [[[[point[0] * across, point[1] * down]]]]  # (images, objects, points, 2)
            where["input_points"] = torch.tensor(place, device=device)
            where["input_labels"] = torch.ones((1, 1, 1), dtype=torch.int32, device=device)
        if box is not None:
            left, top, right, bottom = box
            edges = [[[left * across, top * down, right * across, bottom * down]]]
            where["input_boxes"] = torch.tensor(edges, device=device)

        # 3. the surest of its masks, at the image's size
        with self._lock, torch.inference_mode():
            outputs = self.model(pixel_values=values, multimask_output=True, **where)
        scores = outputs.iou_scores[0, 0]  # (masks,)
        best = int(scores.argmax())
        logits = outputs.pred_masks[0, :, best : best + 1].float()  # (1, 1, height, width)
        full = torch.nn.functional.interpolate(
            logits, (image.height, image.width), mode="bilinear", align_corners=False
        )
        return (full[0, 0] > 0).cpu().numpy(), float(scores[best])
