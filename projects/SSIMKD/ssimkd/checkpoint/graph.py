"""Exports a detector as a graph that runs without Detectron2: TorchScript or ONNX.

    image    (3, H, W) uint8     as the config's mapper gives it: resized, in its channel order
    outputs  one tensor of n rows per field of Detectron2's Instances, such as pred_boxes (n, 4):
             x0, y0, x1, y1 in pixels of this image

Detectron2's TracingAdapter traces the detector on one image. H and W can differ afterwards. The
graph is compared with the detector on all given images before the file gets its name.
"""

import json
import os
import warnings
from contextlib import suppress
from typing import Any, Callable, Dict, List, Sequence, Tuple

import torch
from detectron2.modeling import GeneralizedRCNN
from torch import Tensor, nn

from ssimkd.errors import ConfigError, as_config_error

SUFFIXES = {"torchscript": ".ts", "onnx": ".onnx"}  # of the formats
RTOL, ATOL = 1e-4, 1e-3  # between graph and detector, for masks, scores and boxes in pixels
Graph = Callable[[Tensor], Tuple[Tensor, ...]]


def detect(model: Any, inputs: List[Dict[str, Tensor]]) -> Dict[str, Tensor]:
    """The fields of a detector's Instances in one image: name -> tensor of n rows."""
    if isinstance(model, GeneralizedRCNN) and not hasattr(model, "sem_seg_head"):
        found = model.inference(inputs, do_postprocess=False)[0]  # Masks stay 28 x 28.
    else:
        found = model(inputs)[0]["instances"]
    return {name: getattr(v, "tensor", v) for name, v in found.get_fields().items()}


@torch.no_grad()
def write_graph(
    model: nn.Module,
    images: Sequence[Tensor],
    kind: str,
    folder: str,
    categories: Sequence[Dict[str, Any]] = (),
) -> str:
    """Writes `student.ts` or `student.onnx`.

    An earlier file stays if the export fails.

    Args:
        model (nn.Module): in evaluation mode, on the CPU.
        images (sequence[Tensor]): (3, H, W) uint8. The first is traced, all are compared.
        kind (str): a key of SUFFIXES.
        folder (str): the folder of the file.
        categories (sequence[dict]): "id" and "name" of the classes. As JSON the file keeps them:
            TorchScript in the extra file "categories.json", ONNX in the metadata "categories".

    Returns:
        str: path of the file.

    Raises:
        ConfigError: the detector cannot be traced, the graph does not find what the detector
            finds, or a package is missing.
    """
    try:
        from detectron2.export import TracingAdapter
    except ImportError as error:  # v0.5 imports caffe2 there.
        raise ConfigError(f"--format {kind} needs Detectron2 v0.6 or later") from error
    if hasattr(model, "sem_seg_head"):
        raise ConfigError(f"--format {kind}: a {type(model).__name__} gives more than instances")
    expected = [detect(model, [{"image": image}]) for image in images]
    if not any(len(tensor) for fields in expected for tensor in fields.values()):
        raise ConfigError("--images: the detector finds nothing in them that could be compared")
    adapter = TracingAdapter(
        model, [{"image": images[0]}], lambda *inputs: tuple(detect(*inputs).values())
    )
    path = os.path.join(folder, f"student{SUFFIXES[kind]}")
    os.makedirs(folder, exist_ok=True)
    try:
        with warnings.catch_warnings():
            # Tracing warns of each value that becomes a constant. The comparison finds wrong ones.
            warnings.simplefilter("ignore", torch.jit.TracerWarning)
            write = write_torchscript if kind == "torchscript" else write_onnx
            graph = write(adapter, list(expected[0]), path + ".tmp", json.dumps(list(categories)))
        compare(graph, images, expected, kind)
        os.replace(path + ".tmp", path)
    finally:
        with suppress(FileNotFoundError):
            os.remove(path + ".tmp")
    return path


def write_torchscript(adapter: Any, names: List[str], path: str, categories: str) -> Graph:
    """Writes TorchScript and reads it back. To run, it needs `import torchvision`."""
    graph = torch.jit.trace(adapter, adapter.flattened_inputs, check_trace=False)
    torch.jit.save(graph, path, _extra_files={"categories.json": categories})
    return torch.jit.load(path)


def write_onnx(adapter: Any, names: List[str], path: str, categories: str) -> Graph:
    """Writes ONNX with the fields' names for the outputs, and reads it back."""
    try:
        import onnx
        import onnxruntime
    except ImportError as error:
        raise ConfigError(f"--format onnx needs pip install {error.name}") from error
    torch.onnx.export(
        *(adapter, adapter.flattened_inputs, path),
        dynamo=False,  # torch.export cannot follow Detectron2's padding.
        opset_version=17,
        input_names=["image"],
        output_names=names,
        dynamic_axes={"image": {1: "height", 2: "width"}, **{name: {0: "n"} for name in names}},
    )
    content = onnx.load(path)
    content.metadata_props.add(key="categories", value=categories)
    onnx.save(content, path)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return lambda x: tuple(map(torch.as_tensor, session.run(None, {"image": x.numpy()})))


def compare(
    graph: Graph, images: Sequence[Tensor], expected: List[Dict[str, Tensor]], kind: str
) -> None:
    """Raises ConfigError unless a graph finds in every image what the detector finds."""
    for number, (image, fields) in enumerate(zip(images, expected), start=1):
        failure = (
            f"--format {kind}: nothing is written, since the graph does not agree with the "
            f"detector on image {number}"
        )
        with as_config_error(failure, Exception):  # A wrong graph can fail anywhere.
            for (name, tensor), output in zip(fields.items(), graph(image)):
                torch.testing.assert_close(output, tensor, rtol=RTOL, atol=ATOL, msg=name)
