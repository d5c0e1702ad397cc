"""A trained model ready to read and write text."""

from collections.abc import Mapping
from functools import cached_property
from pathlib import Path

import torch

from milonga.data.bpe import TOKENIZER, load_tokenizer
from milonga.data.text import ByteCodec, TextCodec
from milonga.errors import UserError
from milonga.inference.batch import Batch
from milonga.inference.in_place import InPlace
from milonga.inference.session import Session
from milonga.layers.linear import STORAGES, Storage, StoredLinear, store_weights
from milonga.models.network import Network
from milonga.models.pretrained import fingerprint, load_weights, run_checkpoint

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "float64": torch.float64}


class LanguageModel:
    """A network, the codec that turns text into its tokens, and what is known about the run that trained it.

    Args:
        network: put into eval mode; weights are not to be changed while sessions live.
        codec: its vocabulary must be the network's; None for bytes.
        facts: what the weight file says beside the weights, all strings.
        path: the weight file; None for a network that never was in one.
        rounded: whether the network's weights are those of the file in fewer bits. State files go by the file.

    Raises:
        UserError: if the network's vocabulary is not the codec's.
    """

    def __init__(
        self,
        network: Network,
        codec: TextCodec | None = None,
        facts: Mapping[str, str] | None = None,
        path: Path | None = None,
        rounded: bool = False,
    ):
        self.network = network.eval()
        self.rounded = rounded and path is not None
        self.codec: TextCodec = codec or ByteCodec()
        self.facts = dict(facts or {})
        self.path = path
        if network.config.vocab_size != self.codec.vocab_size:
            raise UserError(
                f"{path or 'model'}: its vocabulary has {network.config.vocab_size} tokens, that of its text codec "
                f"({self.codec.name}) {self.codec.vocab_size}: text can only be read with the codec it was trained with"
            )

    @property
    def device(self) -> torch.device:
        """Where the weights are and sessions live."""
        return self.network.embedding.weight.device

    @cached_property
    def _in_place(self) -> InPlace | None:
        """Where sessions write token by token: captured on a GPU; on a CPU each session for itself."""
        return InPlace(self.network) if self.device.type == "cuda" else None

    @cached_property
    def fingerprint(self) -> str:
        """sha256 (hex) over config and weights; computed when first asked for. State files carry it.

        Of a network that was rounded on loading it is that of the file: a state goes on in any dtype of its model.
        """
        if self.rounded:
            assert self.path is not None
            return fingerprint(load_weights(self.path)[0])
        return fingerprint(self.network)

    @cached_property
    def storage(self) -> Storage | None:
        """What the weights of linear layers are held in, `bf16` or `int8`; None where that is the network's dtype."""
        held = (module.storage for module in self.network.modules() if isinstance(module, StoredLinear))
        return next(held, None)

    def session(self, path: str | Path | None = None) -> Session:
        """A fresh session, or the one saved in a state file.

        Raises:
            UserError: if the state file is missing, damaged, of another model or of a newer format.
        """
        session = Session(self.network, self.codec, lambda: self.fingerprint, self._in_place)
        if path is not None:
            session.restore(path)
        return session

    def batch(self, *, max_rows: int = 16, exact: bool = False, keep: int | None = None) -> Batch:
        """Texts written together, `max_rows` at once; they join and leave while others go on. See `Batch`.

        Raises:
            UserError: if `max_rows` is below 1, or `keep` below 0.
        """
        return Batch(self.network, self.codec, self.session, max_rows=max_rows, exact=exact, keep=keep)

    def __repr__(self) -> str:
        return f"LanguageModel({str(self.path) if self.path else 'in memory'!r}, device={str(self.device)!r})"


def choose_device(device: str | torch.device | None) -> torch.device:
    """The device asked for; for None a GPU where there is one, else the CPU.

    Raises:
        UserError: if it is neither a CPU nor a CUDA device, or there is no such device here.
    """
    if device is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        chosen = torch.device(device)
        torch.empty(0, device=chosen)
    except (RuntimeError, AssertionError) as error:
        first = str(error).splitlines()[0]
        if first.startswith("Expected one of"):  # a list of every device that PyTorch has heard of
            first = "give cpu, cuda or cuda:N"
        raise UserError(f"device {str(device)!r} cannot be used here ({first}); try cpu") from error
    if chosen.type not in ("cpu", "cuda"):
        raise UserError(f"device {str(device)!r} cannot be used: only cpu, cuda and cuda:N are supported")
    return chosen


def choose_dtype(dtype: str | torch.dtype | None) -> torch.dtype | None:
    """The dtype of that name; None for None.

    Raises:
        UserError: if it is none that networks run in.
    """
    if dtype is None:
        return None
    name = str(dtype).removeprefix("torch.")
    if name not in DTYPES:
        raise UserError(f"dtype {name!r} cannot be used; choose from {', '.join(DTYPES)}")
    return DTYPES[name]


def load(
    path: str | Path,
    *,
    device: str | torch.device | None = None,
    dtype: str | torch.dtype | None = None,
    weights: Storage | None = None,
) -> LanguageModel:
    """The model of a run, a checkpoint folder or a weight file, ready to read and write text.

    Args:
        path: a run's folder (its last checkpoint is taken), a checkpoint folder, or a weight file.
        device: such as `cpu` or `cuda:1`; None for a GPU where there is one, else the CPU.
        dtype: of weights and activations, such as `bfloat16`; recurrent states, norms and what the recurrence is made
            of stay at least fp32. None for that of the file.
        weights: on a CPU, hold the weights of linear layers in `bf16` or `int8` and compute as before: decoding, which
            mostly reads them, is up to two and four times as fast.

    Raises:
        UserError: if there is no model at `path`, it is damaged or of a newer format, or the device, the dtype or the
            storage of weights cannot be used.
    """
    where, wanted = choose_device(device), choose_dtype(dtype)
    if weights is not None and weights not in STORAGES:
        raise UserError(f"weights {weights!r} cannot be used; choose from {', '.join(STORAGES)}")
    if weights is not None and where.type != "cpu":
        raise UserError(f"weights {weights!r} can be used on a CPU only, not on {where}; give dtype='bfloat16' there")
    file = run_checkpoint(path)
    network, header = load_weights(file, device=where)
    network = network if wanted is None else network.to(wanted)
    if weights is not None:
        _check_storage(weights, network.embedding.weight.dtype)
        store_weights(network, weights)
    facts = {key: value for key, value in header.items() if key not in ("format", "config")}
    return LanguageModel(network, _codec(file, header), facts, file, rounded=(wanted or weights) is not None)


def _check_storage(weights: Storage, dtype: torch.dtype) -> None:
    """Raise `UserError` where products of activations of `dtype` do not take weights in this storage."""
    if weights == "bf16" and dtype not in (torch.float32, torch.bfloat16):
        name = str(dtype).removeprefix("torch.")
        raise UserError(
            f"weights 'bf16' cannot be used beside dtype {name!r}: "
            "give dtype='float32' or 'bfloat16', or weights='int8'"
        )


def _codec(weights: Path, header: Mapping[str, str]) -> TextCodec:
    """The codec that a weight file's header names: bytes, or the tokenizer that lies beside the file.

    Raises:
        UserError: if that is missing, damaged or another one, or of a kind that is not known.
    """
    name = header.get("codec", ByteCodec.name)
    if name == ByteCodec.name:
        return ByteCodec()
    if name != "bpe":
        raise UserError(f"{weights}: its text codec '{name}' is not known here; upgrade milonga")
    path = weights.with_name(TOKENIZER)
    if not path.is_file():
        raise UserError(f"{weights}: reads subwords, and its {TOKENIZER} does not lie beside it: put it back")
    codec = load_tokenizer(path)
    if codec.digest != header.get("tokenizer"):
        raise UserError(f"{path}: not the tokenizer that the model beside it was trained with: put that one back")
    return codec
