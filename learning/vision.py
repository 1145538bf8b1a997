"""Models that see: an image becomes the tower's inputs and the tokens that stand for it.

    vision = find_vision("Qwen/Qwen2.5-VL-3B-Instruct", tokenizer)   # None: it reads text only
    picture = vision.prepare(image)              # resized once, with PIL; its pixels, its ids
    ids = vision.expand(ids, [picture])          # as they are trained: a placeholder for each patch
    short = collapse(ids, [picture])             # as an engine takes them: one for the image

Tokenizer and image processor are loaded by themselves. The processor is the one that computes with
PIL and numpy, whether torchvision is installed or not: that one resizes in another way, which moves
logprobs by 1e-3 to 3e-2. Whoever shows `picture.shown` to a model has only to normalise it.

A model is let in where tests/test_vision.py has proved its family: logprobs of the engine, of the
trainer in any micro-batch and of a plain forward pass are one.

Shapes: T tokens, B rows, N images.
"""

import hashlib
import inspect
import weakref
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from types import SimpleNamespace

import torch

from images import Picture, open_image
from run.config import UserError
from tasks import tiny
from trajectory import image_spans


@dataclass(frozen=True)
class Family:
    """What differs from one family of models to another."""

    processor: str  # its class in transformers that needs no torchvision
    token: str  # what its templates write for an image
    has_grid: bool  # positions have rows and columns (M-RoPE, Qwen2-VL, arXiv:2409.12191)
    has_tiles: bool = False  # InternVL's: cut into as many as fit its sides best, and the whole
    in_vllm: bool = False  # proved there too, by tests/test_vision_vllm.py


QWEN = Family("Qwen2VLImageProcessorPil", "<|image_pad|>", has_grid=True, in_vllm=True)
FAMILIES = {  # by the model_type of the config
    "qwen2_vl": QWEN,
    "qwen2_5_vl": QWEN,
    "qwen3_vl": QWEN,
    # vLLM's CPU build has its linear attention in bfloat16 only, which is no proof to 1e-4
    "qwen3_5": replace(QWEN, in_vllm=False),
    "idefics3": Family("Idefics3ImageProcessorPil", "<image>", has_grid=False, in_vllm=True),
    "smolvlm": Family("SmolVLMImageProcessorPil", "<image>", has_grid=False, in_vllm=True),
    "internvl": Family("GotOcr2ImageProcessorPil", "<IMG_CONTEXT>", has_grid=False, has_tiles=True),
}

PATCHES_AT_ONCE = 2**13  # that go through a tower that does not learn, without a gradient
# Why others are not let in.
BOTH_WAYS = (
    "its images attend both ways among themselves, so that each has to be read in one piece, and "
    "the line breaks around them become one token with their neighbours'"
)
REFUSED = {
    "gemma3": BOTH_WAYS,
    "gemma4": "its images attend both ways among themselves, so that each is read in one piece",
    "lfm2_vl": "its image processor needs torchvision, which resizes in another way than PIL",
}


# -- which models see


def read_config(name: str):
    """Reads the config of a folder or hub id."""
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(name)
    except (OSError, ValueError, KeyError) as error:
        reason = " ".join(str(error).split())[:300]
        raise UserError(f"model = {name!r}: {reason}") from None


def find_vision(name: str, tokenizer, min_pixels: int = 0, max_pixels: int = 0) -> "Vision | None":
    """Loads what shows images to the model `name` (a whole one, not an adapter); None where it
    reads text only, its family is not proved, or it lacks what showing takes: `why_blind` says.

    min_pixels, max_pixels: of an image as it is shown; 0: as the model's processor says. UserError
    where they have no effect.
    """
    config = read_config(name)
    family = FAMILIES.get(config.model_type)
    processor = None
    if family and tokenizer.convert_ids_to_tokens(config.image_token_id) == family.token:
        processor = load_processor(name, family, min_pixels, max_pixels)
    is_resized = bool(min_pixels or max_pixels)
    if processor is None:
        if is_resized:
            raise UserError(f"min_pixels and max_pixels have no effect: {why_blind(name)}")
        return None
    return Vision(config, family, processor, tokenizer, is_resized)


def tiny_vision(tokenizer) -> "Vision":
    """Makes what shows images to the tiny model from scratch (tasks/tiny.py)."""
    config = tiny.config_that_sees(tokenizer)
    family = FAMILIES[config.model_type]
    # no files say its size yet: the processor is saved with what is trained
    return Vision(config, family, tiny.image_processor(), tokenizer, is_resized=True)


def why_blind(name: str) -> str:
    """Says why a model is shown no images."""
    config = read_config(name)
    known = ", ".join(FAMILIES)
    if getattr(config, "vision_config", None) is None:
        return f"model = {name!r} ({config.model_type}) sees no images: take one of {known}"
    if config.model_type in FAMILIES:
        return (
            f"model = {name!r} has no image processor (preprocessor_config.json), or its tokenizer "
            "no token for an image: get all of its files"
        )
    reason = REFUSED.get(config.model_type, "")
    if reason:
        reason += "; "
    return (
        f"model = {name!r} is of the family {config.model_type}, which is not proved for images: "
        f"{reason}take one of {known}"
    )


def load_processor(name: str, family: Family, min_pixels: int, max_pixels: int):
    """Loads the image processor of a folder or hub id; None if there is none."""
    import transformers

    processor_class = getattr(transformers, family.processor)
    try:
        processor = processor_class.from_pretrained(name)
    except (OSError, ValueError):
        return None
    if not (min_pixels or max_pixels):
        return processor
    if not family.has_grid:
        raise UserError(
            "min_pixels and max_pixels have no effect on a model that cuts images into squares: "
            "set size and max_image_size (InternVL: max_patches) in its preprocessor_config.json, "
            f"and drop them ({name!r})"
        )
    smallest = min_pixels or processor.size["shortest_edge"]
    largest = max_pixels or processor.size["longest_edge"]
    if smallest > largest:
        raise UserError(f"min_pixels = {smallest}: expected at most max_pixels = {largest}")
    size = {"shortest_edge": smallest, "longest_edge": largest}
    return processor_class.from_pretrained(name, size=size)


# -- an image, and the tokens that stand for it


class Vision:
    """Shows images to the models of one family.

    processor: of transformers, saved beside what is trained. placeholder: the id whose embeddings
    are replaced by those of the tower; token: its text. is_resized: images have another size than
    the model's files say.
    """

    def __init__(self, config, family: Family, processor, tokenizer, is_resized: bool = False):
        self.family = family
        self.processor = processor
        self.tokenizer = tokenizer
        self.placeholder = config.image_token_id
        self.token = family.token
        self.is_resized = is_resized
        self.patch_size = config.vision_config.patch_size
        if family.has_tiles:  # given for both sides
            self.patch_size = self.patch_size[0]
        # of those that cut images into squares: how many placeholders a square has
        self.square_tokens = 0
        if family.has_tiles:
            self.square_tokens = config.image_seq_length
        elif not family.has_grid:
            side = config.vision_config.image_size // self.patch_size
            self.square_tokens = side**2 // config.scale_factor**2

    def prepare(self, image, is_resized: bool = False) -> Picture:
        """Makes the Picture of a PIL image (RGB). is_resized: it is one that was shown before, as
        a recorded rollout has it. UserError for one that the processor refuses."""
        try:
            shown = image if is_resized else self._resize(image)
            if self.family.has_grid:
                return self._with_grid(image, shown)
            if self.family.has_tiles:
                return self._in_tiles(image, shown)
            return self._in_squares(image, shown)
        except ValueError as error:  # sides of which one is 200 times the other
            raise UserError(f"an image of {image.width} x {image.height} pixels: {error}") from None

    def reopen(self, sources: list, folder: str | None) -> list[Picture]:
        """Opens images that were shown before, such as those of a recorded rollout: they have their
        size already."""
        return [self.prepare(open_image(source, folder), is_resized=True) for source in sources]

    def _resize(self, image):
        """Resizes as the processor would: by its own functions, which are PIL's."""
        from PIL import Image

        processor = self.processor
        resample = processor.resample
        pixels = processor.process_image(image)  # (3, height, width) of bytes
        if self.family.has_grid:
            factor = processor.patch_size * processor.merge_size
            pixels = processor.resize(pixels, processor.size, resample, factor=factor)
        elif self.family.has_tiles:
            pixels = processor.resize(pixels, self._canvas(pixels), resample)
        else:
            side = processor.max_image_size["longest_edge"]
            if processor.do_resize:
                pixels = processor.resize(pixels, processor.size, resample)
            if processor.do_image_splitting:
                pixels = processor.resize_for_vision_encoder(pixels, side, resample)
            else:
                square = type(processor.size)(height=side, width=side)
                pixels = processor.resize(pixels, square, resample)
        return Image.fromarray(pixels.transpose(1, 2, 0))

    def _with_grid(self, image, shown) -> Picture:
        inputs = self.processor(images=[shown], do_resize=False, return_tensors="pt")
        _, height, width = inputs["image_grid_thw"][0].tolist()  # in patches
        merge = self.processor.merge_size
        grid = (height // merge, width // merge)
        tokens = grid[0] * grid[1]
        ids = [self.placeholder] * tokens
        names = ("pixel_values", "image_grid_thw")
        return self._picture(image, shown, inputs, names, ids, height * width, grid)

    def _in_squares(self, image, shown) -> Picture:
        inputs = self.processor(
            images=[[shown]], do_resize=False, return_row_col_info=True, return_tensors="pt"
        )
        rows = int(inputs["rows"][0][0])
        columns = int(inputs["cols"][0][0])
        text = self._text_of_squares(rows, columns)
        ids = self.tokenizer.encode(text, add_special_tokens=False)
        _, squares, _, height, width = inputs["pixel_values"].shape
        patches = squares * (height // self.patch_size) * (width // self.patch_size)
        names = ("pixel_values", "pixel_attention_mask")
        # without the batch's dimension: (squares, 3, height, width)
        inputs = {name: inputs[name][0] for name in names}
        return self._picture(image, shown, inputs, names, ids, patches, grid=None)

    def _canvas(self, pixels):
        """Finds the size of as many whole tiles as fit the sides of an image best."""
        from transformers.models.got_ocr2 import image_processing_pil_got_ocr2 as got_ocr2

        tile = self.processor.size
        columns, rows = got_ocr2.get_optimal_tiled_canvas(
            pixels.shape[1:],
            (tile.height, tile.width),
            self.processor.min_patches,
            self.processor.max_patches,
        )
        return type(tile)(height=rows * tile.height, width=columns * tile.width)

    def _in_tiles(self, image, shown) -> Picture:
        # of several, the last is the whole image, small: made of what is shown, and so resized
        # twice, but for every engine alike
        inputs = self.processor(images=[shown], crop_to_patches=True, return_tensors="pt")
        tiles, _, height, width = inputs["pixel_values"].shape
        patches = tiles * (height // self.patch_size) * (width // self.patch_size)
        text = f"<img>{self.token * self.square_tokens * tiles}</img>"
        ids = self.tokenizer.encode(text, add_special_tokens=False)
        return self._picture(image, shown, inputs, ("pixel_values",), ids, patches, grid=None)

    def _text_of_squares(self, rows: int, columns: int) -> str:
        """Writes what Idefics3's and SmolVLM's processors write for an image that was cut into rows
        and columns, 0 and 0 if it was not."""
        square = self.token * self.square_tokens
        text = ""
        for row in range(1, rows + 1):
            for column in range(1, columns + 1):
                text += f"<fake_token_around_image><row_{row}_col_{column}>{square}"
            text += "\n"
        if rows:
            text += "\n"
        return f"{text}<fake_token_around_image><global-img>{square}<fake_token_around_image>"

    def _picture(self, image, shown, inputs, names, ids, patches, grid) -> Picture:
        pixels = {name: inputs[name] for name in names}
        digest = hashlib.blake2b(digest_size=8)
        for tensor in pixels.values():
            digest.update(repr(tuple(tensor.shape)).encode())
            digest.update(tensor.contiguous().numpy().tobytes())
        return Picture(
            image,
            shown,
            pixels=pixels,
            ids=ids,
            placeholder=self.placeholder,
            tokens=ids.count(self.placeholder),
            patches=patches,
            grid=grid,
            key=(int.from_bytes(digest.digest(), "big") >> 1) or 1,
            again=partial(self._pixels_of, shown),
        )

    def _pixels_of(self, shown) -> dict:
        return self.prepare(shown, is_resized=True).pixels

    def expand(self, ids: list[int], pictures: Sequence[Picture]) -> list[int]:
        """Puts the ids of each picture in the place of the one that a template wrote for it."""
        assert ids.count(self.placeholder) == len(pictures), "one placeholder for each picture"
        waiting = iter(pictures)
        expanded = []
        for token in ids:
            if token == self.placeholder:
                expanded += next(waiting).ids
            else:
                expanded.append(token)
        return expanded

    def fits(self, ids: list[int], pictures: Sequence[Picture]) -> bool:
        """Says whether ids hold as many placeholders as the pictures have."""
        return ids.count(self.placeholder) == sum(picture.tokens for picture in pictures)


def collapse(ids: list[int], pictures: Sequence[Picture]) -> list[int]:
    """Undoes Vision.expand: engines that show images themselves take one placeholder for each."""
    collapsed = []
    at = 0
    for picture, (first, end) in zip(pictures, image_spans(ids, pictures), strict=True):
        collapsed += ids[at:first]
        collapsed.append(picture.placeholder)
        at = end
    return collapsed + ids[at:]


def whole_beginning(
    ids: list[int], pictures: Sequence[Picture], limit: int
) -> tuple[int, list[Picture]]:
    """Finds how many of the first `limit` ids can stay, so that no picture is cut in two; returns
    that and the pictures in them."""
    inside = []
    for picture, (first, end) in zip(pictures, image_spans(ids, pictures), strict=True):
        if end > limit:
            return min(limit, first), inside
        inside.append(picture)
    return limit, inside


# -- what tells rows apart


def identities(ids: list[int], pictures: Sequence[Picture]) -> list[int]:
    """Returns ids in which a placeholder is a number of its picture's own, below 0: equal ids with
    different pictures are different prompts."""
    if not pictures:
        return ids
    placeholder = pictures[0].placeholder
    keys = []
    for picture in pictures:
        keys += [-picture.key] * picture.tokens
    waiting = iter(keys)
    return [next(waiting) if token == placeholder else token for token in ids]


def count_inside(ids: list[int], pictures: Sequence[Picture]) -> int:
    """Counts the pictures whose placeholders are in `ids`, the beginning of a row."""
    if not pictures:
        return 0
    placeholders = ids.count(pictures[0].placeholder)
    inside = 0
    while placeholders > 0:
        placeholders -= pictures[inside].tokens
        inside += 1
    assert placeholders == 0, "the beginning ends inside of a picture"
    return inside


def count_patches(
    beginning: list[int], pictures: Sequence[Picture], are_kept: bool
) -> tuple[int, int]:
    """Counts the patches that pass through the tower with a row: (of all its pictures, of those in
    its first ids). are_kept: what `keeps_pictures` says of the model; none passes then, whether it
    was seen before or not: micro-batches are cut alike by ranks that have seen different ones."""
    if are_kept:
        return 0, 0
    inside = count_inside(beginning, pictures)
    patches = [picture.patches for picture in pictures]
    return sum(patches), sum(patches[:inside])


# -- what a model is given


@dataclass(frozen=True)
class Seen:
    """What the tower of one model made of a picture, on the CPU."""

    tower: weakref.ref  # of the model
    embeddings: torch.Tensor  # (tokens, H), or (squares, tokens of a square, H)
    deeper: list[torch.Tensor]  # of Qwen3-VL: (tokens, H) for each layer that has some added


def image_inputs(model, pictures: Sequence[Picture], device) -> dict:
    """Makes what a model is given for N pictures, in the order of their placeholders; {} of none.

    Of a tower that learns, it is their pixels. What another makes of a picture is the same in every
    turn, micro-batch and update, so each goes through it once: what it gives is kept in the picture
    and its pixels, which are many times as large, are freed.
    """
    if not pictures:
        return {}
    whole = _below_the_head(model)
    if not keeps_pictures(model):
        return tower_inputs(pictures, device)

    # 1. those that did not go through the tower before, as many at once as there is room for
    new = {}
    for picture in pictures:
        seen = picture.seen
        if seen is None or seen.tower() is not whole:
            new[id(picture)] = picture
    for part in _parts(list(new.values())):
        _let_see(whole, part, device)

    # 2. as the tower would give them
    embeddings = [picture.seen.embeddings.to(device) for picture in pictures]
    if pictures[0].grid is None:
        embeddings = torch.cat(embeddings)
    deeper = []
    for layers in zip(*(picture.seen.deeper for picture in pictures), strict=True):
        deeper.append([layer.to(device) for layer in layers])
    output = SimpleNamespace(pooler_output=embeddings, deepstack_features=deeper)
    return {"mm_encoder_outputs": {"image": output}}


def _below_the_head(model):
    """Returns tower and layers; of a model with adapters, peft has a base_model of its own."""
    if getattr(model, "peft_config", None):
        model = model.get_base_model()
    return model.base_model


def keeps_pictures(model) -> bool:
    """Says whether what the tower makes of a picture stays the same, and can be given back to the
    model: transformers takes it since 5.19."""
    whole = _below_the_head(model)
    if "mm_encoder_outputs" not in inspect.signature(whole.forward).parameters:
        return False
    of_text = {id(parameter) for parameter in whole.get_decoder().parameters()}
    for parameter in whole.parameters():
        if parameter.requires_grad and id(parameter) not in of_text:
            return False
    return True


def _parts(pictures: list[Picture]) -> list[list[Picture]]:
    """Divides pictures into those that go through the tower at once."""
    parts = []
    room = 0  # patches
    for picture in pictures:
        if not parts or picture.patches > room:
            parts.append([])
            room = PATCHES_AT_ONCE
        parts[-1].append(picture)
        room -= picture.patches
    return parts


def _let_see(whole, pictures: list[Picture], device) -> None:
    """Sends pictures through the tower; sets `seen` of each, and frees its pixels."""
    # not in inference mode, where an engine is: autograd refuses tensors that were made there
    with torch.inference_mode(False), torch.no_grad():
        for picture in pictures:
            picture.pixels = picture.pixels or picture.again()
        inputs = tower_inputs(pictures, device)
        output = whole.get_image_features(**inputs, return_dict=True)
    embeddings = output.pooler_output
    if pictures[0].grid is None:  # else transformers gives those of each picture apart
        squares = [len(picture.pixels["pixel_values"]) for picture in pictures]
        embeddings = embeddings.split(squares)
    layers = getattr(output, "deepstack_features", None) or []
    for number, picture in enumerate(pictures):
        # not views, which hold those of all
        kept = embeddings[number].cpu().clone()
        deeper = [layer[number].cpu().clone() for layer in layers]
        picture.seen = Seen(weakref.ref(whole), kept, deeper)
        picture.pixels = {}


def tower_inputs(pictures: Sequence[Picture], device) -> dict[str, torch.Tensor]:
    """Joins the pixels of N pictures, in the order of their placeholders; {} of none."""
    if not pictures:
        return {}
    of_each = [picture.pixels or picture.again() for picture in pictures]
    inputs = {}
    for name in of_each[0]:
        inputs[name] = torch.cat([pixels[name] for pixels in of_each]).to(device)
        if "pixel_attention_mask" in of_each[0]:  # squares: (1, all of them, ...), whatever B is
            inputs[name] = inputs[name][None]
    return inputs


def positions(ids: list[int], pictures: Sequence[Picture]) -> torch.Tensor:
    """Computes the (3, T) positions (time, row, column) of a whole row in which images have rows
    and columns: what get_rope_index of Qwen's models does for images.

    A picture's placeholders begin behind the text before it, in all three; the text behind it goes
    on after the longer of its sides.
    """
    parts = []
    start = 0  # the next position
    at = 0  # the next token
    for picture in pictures:
        first = ids.index(picture.placeholder, at)
        parts.append(_along(start, first - at))
        start += first - at
        rows, columns = picture.grid
        cells = torch.cartesian_prod(torch.arange(rows), torch.arange(columns)).T  # (2, tokens)
        times = torch.zeros(1, picture.tokens, dtype=torch.long)
        parts.append(torch.cat([times, cells]) + start)
        start += max(rows, columns)
        at = first + picture.tokens
    parts.append(_along(start, len(ids) - at))
    return torch.cat(parts, dim=1)


def _along(start: int, count: int) -> torch.Tensor:
    """Makes the (3, count) positions of text."""
    return torch.arange(start, start + count).expand(3, count)


def batch_positions(
    rows: list[list[int]], pictures: list[Sequence[Picture]], on_left: bool = False
) -> torch.Tensor | None:
    """Computes the (3, B, T) positions of padded rows, 0 where there is padding; None where no
    picture has a grid: then they are those of text."""
    has_grid = any(picture.grid for row_pictures in pictures for picture in row_pictures)
    if not has_grid:
        return None
    width = max(map(len, rows))
    table = torch.zeros(3, len(rows), width, dtype=torch.long)
    for number, (ids, row_pictures) in enumerate(zip(rows, pictures, strict=True)):
        columns = slice(width - len(ids), width) if on_left else slice(0, len(ids))
        table[:, number, columns] = positions(ids, row_pictures)
    return table
