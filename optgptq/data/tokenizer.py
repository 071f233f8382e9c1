"""The tokenizer of a model folder: text to ids and back, special tokens, chat rendering.

Special tokens are never added by `encode`; text that spells one out is encoded as that token, as transformers does.
`tokenizer.json` is used directly where transformers would use it unchanged. Some tokenizer classes are rebuilt by
transformers with other rules than the file states (a LlamaTokenizer of version 4 gives other ids at line starts), so
every other class goes through `transformers.AutoTokenizer`, whose import takes seconds.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import tokenizers

from optgptq.data.chat import chat_template_of, render_chat
from optgptq.data.tokenizer_files import declared_tokens, named_special_tokens, read_json, token_ids
from optgptq.errors import TextError

# Classes whose tokenizer.json transformers 5 takes as it is, and model types for which it does not do so even then.
UNCHANGED_CLASSES = frozenset({"TokenizersBackend", "PreTrainedTokenizerFast"})
REBUILT_MODEL_TYPES = frozenset({"phi3", "qwen2"})
# Settings with which transformers changes the tokenizer after it is read.
CHANGING_KEYS = ("auto_map", "split_special_tokens", "fix_mistral_regex")
VOCABULARY_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "tekken.json")


class TokenizerBackend(Protocol):
    """What a library must be able to do; nothing is added to the text and nothing left out of the ids."""

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]: ...

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool) -> str: ...


@dataclass(frozen=True, slots=True, eq=False)
class _NativeBackend:
    native: tokenizers.Tokenizer

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        # The fast variant leaves out character offsets: 2.5 times faster on one long text, same ids.
        encodings = self.native.encode_batch_fast(list(texts), add_special_tokens=False)
        return [encoding.ids for encoding in encodings]

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool) -> str:
        return str(self.native.decode(list(ids), skip_special_tokens=skip_special_tokens))


@dataclass(frozen=True, slots=True, eq=False)
class _TransformersBackend:
    transformed: Any  # PreTrainedTokenizerBase; its module is too slow to import for a type

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        if not texts:
            return []
        batch = self.transformed(list(texts), add_special_tokens=False, return_attention_mask=False, verbose=False)
        return [list(ids) for ids in batch["input_ids"]]

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool) -> str:
        return str(self.transformed.decode(list(ids), skip_special_tokens=skip_special_tokens))


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class Tokenizer:
    """A model's tokenizer.

    Attributes:
        folder: where it was read from; for messages.
        vocab_size: ids run from 0 to one less, added tokens included.
        bos_token_id: begin-of-sequence id of the tokenizer, else of the model's configuration, else None.
        eos_token_ids: ids that end generation, of the first that has any: generation_config, config, tokenizer.
        adds_bos: the tokenizer puts the BOS in front by itself, so the model was trained with it there. Seen from what
            it does: the flag `add_bos_token` of tokenizer_config.json has no effect beside a tokenizer.json.
        special_tokens: named special tokens (`bos_token`, ...) for chat templates.
        chat_template: Jinja source, or None.
    """

    folder: Path
    backend: TokenizerBackend
    vocab_size: int
    bos_token_id: int | None
    eos_token_ids: tuple[int, ...]
    adds_bos: bool
    special_tokens: Mapping[str, str]
    chat_template: str | None

    def encode(self, text: str) -> list[int]:
        """Return the ids of `text` as one piece, without any token that is not in the text."""
        return self.backend.encode_batch([text])[0]

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Return the ids of each text; equal to `encode` on each, but on all cores."""
        return self.backend.encode_batch(texts)

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool = False) -> str:
        """Return the text of `ids`; special tokens are spelled out unless they are skipped."""
        return self.backend.decode(ids, skip_special_tokens=skip_special_tokens)

    def render_chat(self, messages: Sequence[Mapping[str, Any]], *, add_generation_prompt: bool = False) -> str:
        """Return the messages as text through the model's chat template.

        With `add_generation_prompt` the text ends with what the model writes its answer after.

        Raises:
            TextError: the model has no chat template, or the template refuses the messages.
        """
        return render_chat(
            messages,
            self.chat_template,
            special_tokens=self.special_tokens,
            folder=self.folder,
            add_generation_prompt=add_generation_prompt,
        )


def _read_native(path: Path) -> tokenizers.Tokenizer:
    read_json(path)  # a damaged file is named by our own reader, not by the Rust parser
    try:
        native = tokenizers.Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises the bare class
        raise TextError(
            f"tokenizer file {path.name}",
            expected="a tokenizer that the tokenizers library can build",
            found=str(error),
            action=f"Copy {path.name} into {path.parent} again, or save it with an up-to-date transformers.",
        ) from error
    native.no_truncation()
    native.no_padding()
    return native


def _open_native(
    folder: Path, config: Mapping[str, Any], special_tokens: Mapping[str, str]
) -> tokenizers.Tokenizer | None:
    """Return the tokenizer of `tokenizer.json` if transformers would use it unchanged, else None."""
    path = folder / "tokenizer.json"
    if not _is_one_of(config.get("tokenizer_class"), UNCHANGED_CLASSES) or not path.is_file():
        return None
    if any(key in config for key in CHANGING_KEYS):
        return None
    if _is_one_of(read_json(folder / "config.json").get("model_type"), REBUILT_MODEL_TYPES):
        return None
    native = _read_native(path)
    added = {token.content for token in native.get_added_tokens_decoder().values()}
    return native if declared_tokens(config, special_tokens) <= added else None


def _is_one_of(value: object, names: frozenset[str]) -> bool:
    return isinstance(value, str) and value in names


def _open_transformers(folder: Path) -> Any:
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError, ImportError, KeyError, TypeError, AttributeError) as error:
        raise TextError(
            f"tokenizer of {folder}",
            expected="a tokenizer that transformers can load without running code from the folder",
            found=str(error).splitlines()[0] if str(error) else type(error).__name__,
            action="Copy the tokenizer files of the model into the folder, best a tokenizer.json.",
        ) from error


def _require_vocabulary(folder: Path) -> None:
    if not has_tokenizer(folder):
        raise TextError(
            f"tokenizer of {folder}",
            expected="one of the files " + ", ".join(VOCABULARY_FILES),
            found="none of them",
            action="Copy the tokenizer files of the model into the folder.",
        )


def has_tokenizer(folder: Path) -> bool:
    """True if the folder has the files of a tokenizer."""
    return any((folder / name).is_file() for name in VOCABULARY_FILES)


def load_tokenizer(folder: Path) -> Tokenizer:
    """Return the tokenizer in a model folder. Nothing is fetched and no code of the folder is run.

    Raises:
        TextError: no tokenizer there, or one that cannot be read.
    """
    _require_vocabulary(folder)
    config = read_json(folder / "tokenizer_config.json")
    special_tokens = named_special_tokens(config, read_json(folder / "special_tokens_map.json"))
    native = _open_native(folder, config, special_tokens)
    backend: TokenizerBackend
    if native is not None:
        backend, vocab_size = _NativeBackend(native), native.get_vocab_size()
        bos = native.token_to_id(special_tokens.get("bos_token", ""))
        eos = native.token_to_id(special_tokens.get("eos_token", ""))
        habit = native.encode("a").ids
    else:
        loaded = _open_transformers(folder)
        backend, vocab_size = _TransformersBackend(loaded), len(loaded)
        bos, eos = loaded.bos_token_id, loaded.eos_token_id
        habit = loaded("a")["input_ids"]
        special_tokens = {name: str(text) for name, text in loaded.special_tokens_map.items() if isinstance(text, str)}
    generation, model = read_json(folder / "generation_config.json"), read_json(folder / "config.json")
    bos_ids = token_ids(bos, generation.get("bos_token_id"), model.get("bos_token_id"))
    return Tokenizer(
        folder=folder,
        backend=backend,
        vocab_size=vocab_size,
        bos_token_id=bos_ids[0] if bos_ids else None,
        eos_token_ids=token_ids(generation.get("eos_token_id"), model.get("eos_token_id"), eos),
        adds_bos=bos is not None and habit[:1] == [bos],
        special_tokens=special_tokens,
        chat_template=chat_template_of(folder, config),
    )
