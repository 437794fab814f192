"""Zero-shot image classification at the command line, with CLIP.

The library behind the command: `load_model`, `build_classifier`, `classify`, `embed`. Importing it imports nothing
heavy; a name's module is imported when the name is first used (PEP 562).
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from clipcli.errors import ClipcliError as ClipcliError
    from clipcli.output.embeddings import Embeddings as Embeddings
    from clipcli.output.embeddings import load_embeddings as load_embeddings
    from clipcli.output.spool import save_embeddings as save_embeddings
    from clipcli.records import Candidate as Candidate
    from clipcli.records import Embedded as Embedded
    from clipcli.records import Failure as Failure
    from clipcli.records import Label as Label
    from clipcli.records import Prediction as Prediction
    from clipcli.records import Source as Source
    from clipcli.store.database import Store as Store
    from clipcli.tasks.build import build_classifier as build_classifier
    from clipcli.tasks.classify import ClassifyOptions as ClassifyOptions
    from clipcli.tasks.classify import classify as classify
    from clipcli.tasks.compare import Comparison as Comparison
    from clipcli.tasks.compare import compare as compare
    from clipcli.tasks.embed import EmbedOptions as EmbedOptions
    from clipcli.tasks.embed import embed as embed
    from clipcli.tasks.embed_texts import embed_texts as embed_texts
    from clipcli.weights.model import Model as Model
    from clipcli.weights.model import load_model as load_model
    from clipcli.zeroshot.classifier import Classifier as Classifier
    from clipcli.zeroshot.classifier_file import load_classifier as load_classifier
    from clipcli.zeroshot.classifier_file import save_classifier as save_classifier

__version__ = "0.1.0"

_HOME = {
    "Candidate": "records",
    "Classifier": "zeroshot.classifier",
    "ClassifyOptions": "tasks.classify",
    "ClipcliError": "errors",
    "Comparison": "tasks.compare",
    "EmbedOptions": "tasks.embed",
    "Embedded": "records",
    "Embeddings": "output.embeddings",
    "Failure": "records",
    "Label": "records",
    "Model": "weights.model",
    "Prediction": "records",
    "Source": "records",
    "Store": "store.database",
    "build_classifier": "tasks.build",
    "classify": "tasks.classify",
    "compare": "tasks.compare",
    "embed": "tasks.embed",
    "embed_texts": "tasks.embed_texts",
    "load_classifier": "zeroshot.classifier_file",
    "load_embeddings": "output.embeddings",
    "load_model": "weights.model",
    "save_classifier": "zeroshot.classifier_file",
    "save_embeddings": "output.spool",
}
__all__ = ["__version__", *_HOME]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'clipcli' has no attribute {name!r}")
    value = getattr(import_module(f"clipcli.{_HOME[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOME])
