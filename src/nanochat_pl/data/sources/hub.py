"""``data=climbmix``, ``data=fineweb_edu``, ``data=hub``: the files of a data set on a hub, as far as they are here.

Which files are for validation follows from the whole list of the revision's files, never from those that are here:

1. Where names tell (``validation-00000-of-00001.parquet``, ``test/…``): those of the validation split; without one
   those of the test split. Test files are not trained on.
2. Else the last file is.
3. A single file is split by a hash of each document's text, as local files are.
"""

from __future__ import annotations

import itertools
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import platformdirs

from nanochat_pl.common.console import rank_zero_print
from nanochat_pl.common.errors import UserError
from nanochat_pl.common.text_amounts import BYTES_PER_TOKEN, COMPRESSED_SHARE, epochs_of, known_set, shards_for
from nanochat_pl.data.cache.content_cache import fingerprint_of
from nanochat_pl.data.files.formats import check_file
from nanochat_pl.data.files.read import SUFFIXES, format_of
from nanochat_pl.data.files.split_names import configurations_remark, split_files, unused_remark
from nanochat_pl.data.hub.download import PARALLEL, Fetched, fetch_files
from nanochat_pl.data.hub.errors import require_room
from nanochat_pl.data.hub.manifest import HubFile, Manifest, commit_of, known_manifest, open_manifest
from nanochat_pl.data.sources.base import Shard, SourceSettings, Split
from nanochat_pl.data.sources.local import FileDocuments, share_held_out
from nanochat_pl.data.sources.on_demand import DocumentsOnDemand


def split_by_name(files: Sequence[HubFile]) -> tuple[list[HubFile], list[HubFile], list[HubFile]]:
    """The files to train on, those to validate on, and those of no use; of a single one both, see the top of this
    page."""
    if split := split_files(files, lambda file: file.path):
        return split.train, split.held_out, split.unused
    return (list(files[:-1]), [files[-1]], []) if len(files) > 1 else (list(files), list(files), [])


@dataclass(frozen=True)
class ChosenFiles:
    """The files that a training was begun with, by their paths: what has come since is none of its business."""

    commit: str
    train: tuple[str, ...]
    validation: tuple[str, ...]


class HubFiles:
    """A :class:`~nanochat_pl.data.sources.base.Source` of downloaded files; one shard per file.

    Which files are here is looked at when it is made and by :meth:`fetch`, so that all that is said of them fits
    together, whatever another process fetches meanwhile.

    Args:
        ask_hub: for its list of files, where that is not known here.
        refresh: ask for it anyway.
        chosen: of a training that goes on, the files that it was begun with: these and no others.
        with_json: :meth:`fetch` takes the .json files too. They may hold conversations, and never documents.
        tokens_needed: that a training takes of them, for messages; None: no training is to begin.

    Attributes:
        train_files, val_files: of the manifest those that hold documents, up to ``data.num_shards`` to train on.

    Raises:
        UserError: the data set has never been downloaded from; no file of it matches.
    """

    def __init__(
        self,
        settings: SourceSettings,
        cache_dir: Path,
        ask_hub: bool = False,
        refresh: bool = False,
        chosen: ChosenFiles | None = None,
        with_json: bool = False,
        key: str = "data",
        tokens_needed: int | None = None,
    ) -> None:
        assert settings.repo is not None, "checked by the settings"
        self.name = settings.name
        self._settings, self._cache_dir, self._repo = settings, cache_dir, settings.repo
        self._chosen, self._with_json = chosen, with_json
        self._key, self._tokens_needed = key, tokens_needed
        self._all_train_files: list[HubFile] = []
        self._revision = settings.revision
        manifest = known_manifest(self._repo, self._revision or "main", cache_dir)
        if chosen and manifest and manifest.commit != chosen.commit:  # the branch has moved on, the training stays
            self._revision = chosen.commit
            manifest = known_manifest(self._repo, self._revision, cache_dir)
        revision = self._revision or "main"
        self._on_demand: int | None = None  # training files that are fetched when they are read
        if ask_hub and (manifest is None or refresh):
            try:
                manifest = open_manifest(self._repo, revision, cache_dir, refresh)
            except UserError as error:
                raise self._with_command(error) from error
        if manifest is None:
            problem = f"data={self.name}: nothing of {self._repo} ({revision}) is here."
            raise UserError(problem, self._how_to_fetch(self._num_shards_unseen()))
        self._look_at(manifest)

    @property
    def fingerprint(self) -> str:
        return fingerprint_of([shard.fingerprint for split in ("train", "val") for shard in self.shards(split)])

    def describe(self) -> str:
        """One line for people: the commit, which files are read, what is validated on, and the hash of them."""
        files, here = self._listed(self.train_files, self._on_demand), len(self._train_files_here())
        size = sum(file.bytes for file in files) / 1e9
        held_out = f"{self._held_out:.2%} of its documents" if self._is_split_by_hash else self.val_files[0].path
        more = f" and {len(self.val_files) - 1} more" if len(self.val_files) > 1 else ""
        still = f", {here:,} of them here" if here < len(files) else ""
        return (
            f"{self.name}: {self._repo} at commit {self.manifest.commit[:12]}, {len(files):,} of "
            f"{len(self.train_files):,} files ({size:,.2f} GB{still}), validated on {held_out}{more}, "
            f"{self.fingerprint[:12]}"
        ) + "".join(f"; {remark}" for remark in self.remarks())

    def remarks(self) -> list[str]:
        """What is to be known of these files before they are trained on: one line each."""
        return [
            *configurations_remark([file.path for file in self.train_files], "data.files='{}/*'"),
            *unused_remark([file.path for file in self._unused_files]),
        ]

    def shards(self, split: Split) -> list[Shard]:
        """The shards of a split that are here or are fetched when they are read, in the order of the manifest.

        Raises:
            UserError: there is none; or one is not here that must be, of validation or of a training that goes on; says
                how to fetch it.
        """
        files = self.train_files if split == "train" else self.val_files
        listed = self._listed(files, self._on_demand if split == "train" else 0)
        if not listed or (len(listed) < len(files) and (split == "val" or self._chosen)):
            missing = next(file.path for file in files if file.path not in self._here)
            needs = ", and this run was begun with it" if self._chosen else ""
            raise UserError(f"data={self.name}: {missing} of {self._repo} is not here{needs}.", self._how_to_fetch())
        if first := next((self._here[file.path] for file in listed if file.path in self._here), None):
            check_file(first, self._settings.text_column)
        fix = self._how_to_fetch(len(listed) if split == "train" else len(self._train_files_here()))
        return [self._shard(file, split, fix) for file in listed]

    def fetch(self, num_shards: int, parallel: int = PARALLEL) -> Fetched:
        """Have the validation files and the first ``num_shards`` training files here, verified."""
        manifest = self.manifest
        try:
            fetched = fetch_files(manifest, self.files_of(num_shards), self._cache_dir, parallel)
            manifest = fetched.manifest
        finally:  # what has come stays
            self._look_at(manifest)
        return fetched

    def fetch_on_demand(self, num_tokens: int | None) -> None:
        """Have the validation files and the first training file here; the other files that a training takes are
        fetched when their documents are read. How many these are, and their size, is said first.

        Args:
            num_tokens: that the training takes; None: what is here is enough.

        Raises:
            UserError: no network, too little room on the disk for all of them, or what the hub says.
        """
        wanted = max(self.num_shards_for(num_tokens), 1)
        files = [file for file in self.files_of(wanted) if file.path not in self._here]
        if files:
            number = f"{len(files):,} files" if len(files) > 1 else "1 file"
            num_bytes = sum(file.bytes for file in files)
            command = "are" if len(files) > 1 else "is"
            rank_zero_print(
                f"{self._repo}: {number}, {num_bytes / 1e9:,.2f} GB, {command} fetched while the training runs;"
                " it begins when the first one to train on is here."
            )
            require_room(self._repo, num_bytes)
        try:
            if files:  # asked now, and not when the first of them is wanted
                commit_of(self._repo, self.manifest.commit)
            self.fetch(1)
        except UserError as error:
            raise self._with_command(error) from error
        # What the first one holds tells better how many are wanted.
        self._on_demand = max(self.num_shards_for(num_tokens), 1)
        if files and self._on_demand != wanted:
            rank_zero_print(f"{self._repo}: by the text of the first file it is {self._on_demand:,} files to train on.")

    def files_of(self, num_shards: int) -> list[HubFile]:
        """The validation files, the first ``num_shards`` training files and lists of conversations, each once."""
        return list(dict.fromkeys([*self.val_files, *self.train_files[:num_shards], *self._json_files]))

    def chosen(self) -> ChosenFiles:
        """The files that a training begins with now."""
        train, val = self.shards("train"), self.shards("val")
        return ChosenFiles(
            self.manifest.commit, tuple(shard.name for shard in train), tuple(shard.name for shard in val)
        )

    def num_shards_for(self, num_tokens: int | None) -> int:
        """How many training files are wanted: ``data.num_shards``, else about as many as hold so many tokens.

        Never more than there are. Without a number of tokens: those that are here.
        """
        if self._settings.num_shards is not None or self._chosen:
            return len(self.train_files)
        if num_tokens is None:
            return len(self._train_files_here())
        return shards_for(num_tokens, self._crops, self.shard_tokens())

    def shortfall(self, num_tokens: int | None) -> list[str]:
        """What is missing of the files that are wanted, and the command that fetches it; empty where nothing is.

        Of a training that goes on: what there is besides the files that it was begun with.
        """
        if self._chosen:
            return self._new_since()
        listed, wanted = self._listed(self.train_files, self._on_demand), self.num_shards_for(num_tokens)
        tokens = sum(self._tokens_of(listed))
        epochs = 0.0 if num_tokens is None else epochs_of(num_tokens, tokens, self._crops)
        is_bounded = len(self.train_files) < len(self._all_train_files) and epochs > 1
        if len(listed) >= wanted and not is_bounded:
            return []
        line = f"{len(listed):,} of {len(self.train_files):,} training files of {self._repo} are here."
        if len(listed) >= wanted:
            line = f"{self._key}.num_shards={len(self.train_files)}: of {self._repo} no more files are trained on."
        if num_tokens is not None:
            cropped = ", of which cropping drops a part" if self._crops else ""
            line += (
                f" They hold about {_count(tokens)} tokens{cropped}, the plan trains on {_count(num_tokens)}: "
                f"about {epochs:.1f} epochs."
            )
        return [line, self._how_to_fetch(wanted)] if len(listed) < wanted else [line]

    def tokens_here(self) -> float:
        """About how many tokens the training files that are here hold."""
        return sum(self._tokens_of(self._train_files_here()))

    def shard_tokens(self) -> list[float]:
        """About how many tokens each training file holds, here or not."""
        return self._tokens_of(self.train_files)

    def train_command(self) -> str:
        """The command that trains on these files."""
        return f"nanochat-pl train stage=base {self._keys()}"

    def _look_at(self, manifest: Manifest) -> None:
        """Settle which files these are and where they lie."""
        self.manifest = manifest
        self._json_files = files_of_format(manifest, self._settings.files, (".json",)) if self._with_json else []
        documents = files_of_format(manifest, self._settings.files, SUFFIXES) or self._json_files
        if not documents:
            raise _no_documents(manifest, self._settings.files)
        self._all_train_files, self.val_files, self._unused_files = split_by_name(documents)
        self.train_files = self._all_train_files[: self._settings.num_shards]
        if self._chosen:
            self.train_files = [manifest.file(path) for path in self._chosen.train]
            self.val_files = [manifest.file(path) for path in self._chosen.validation]
        self._is_split_by_hash = self._all_train_files == self.val_files
        files = dict.fromkeys([*self._all_train_files, *self.train_files, *self.val_files])
        self._here = {file.path: path for file in files if (path := manifest.at_hand(file))}
        # About how many tokens each file has.
        self._file_tokens = dict(zip((file.path for file in files), self._tokens_of([*files]), strict=True))

    @property
    def _crops(self) -> bool:
        return self._settings.packing_mode == "crop"

    def _listed(self, files: Sequence[HubFile], on_demand: int | None) -> list[HubFile]:
        """Those of the files that are here, and the first ones that are fetched when they are read."""
        return [file for number, file in enumerate(files) if number < (on_demand or 0) or file.path in self._here]

    def _train_files_here(self) -> list[HubFile]:
        return [file for file in self.train_files if file.path in self._here]

    def _new_since(self) -> list[str]:
        candidates = self._all_train_files[: self._settings.num_shards]
        new = sum(file.path in self._here for file in candidates if file not in self.train_files)
        if not new:
            return []
        more = f"{new:,} more files are" if new > 1 else "1 more file is"
        return [f"{more} here of {self._repo}; this run goes on with its {len(self.train_files):,}."]

    def _tokens_of(self, files: Sequence[HubFile]) -> list[float]:
        """An estimate for each file, from its bytes of text; where they are not known, from those of the others."""
        column = self._settings.text_column
        text_bytes = {file.path: size for file in self.train_files if (size := file.column_bytes(column))}
        known = sum(file.bytes for file in self.train_files if file.path in text_bytes)
        share = known / sum(text_bytes.values()) if text_bytes else COMPRESSED_SHARE
        if not text_bytes and (published := known_set(self._repo)):
            return [published.shard_bytes / BYTES_PER_TOKEN] * len(files)
        return [text_bytes.get(file.path, file.bytes / share) / BYTES_PER_TOKEN for file in files]

    @cached_property
    def _held_out(self) -> float | None:
        """Of a single file the share of its documents that is for validation."""
        if not self._is_split_by_hash:
            return None
        return share_held_out([self._here[file.path] for file in self._train_files_here()], self._settings)

    def _shard(self, file: HubFile, split: Split, fix: str) -> Shard:
        path, size = self._here.get(file.path), self._file_tokens[file.path] * BYTES_PER_TOKEN
        problem = f"is damaged: it is not what {self._repo} has."
        place = path or Path(file.path)
        documents = FileDocuments(
            place, split, self._settings, self._held_out, file.sha256, self._cache_dir, problem, fix, at_rest=True
        )
        shard = replace(documents.as_shard(file.path, file.contents), text_bytes=size)
        if self._on_demand is None or split == "val":
            return shard
        on_demand = DocumentsOnDemand(documents, self.manifest, file, self._cache_dir, fix)
        return replace(shard, read=on_demand, fetch=on_demand.fetch)

    def _with_command(self, error: UserError) -> UserError:
        """What the hub, or the way to it, does not give: said with the command that fetches it at another time."""
        if self._tokens_needed is None:
            return error
        return UserError(error.problems, f"{self._how_to_fetch(self._num_shards_unseen())}\n{error.fix}")

    def _num_shards_unseen(self) -> int:
        """About how many files a training takes, where their list may not be here."""
        if hasattr(self, "manifest"):
            return max(self.num_shards_for(self._tokens_needed), 1)
        if self._settings.num_shards is not None:
            return self._settings.num_shards
        published = known_set(self._repo)
        if published is None or self._tokens_needed is None:
            return 8
        tokens = itertools.repeat(published.shard_bytes / BYTES_PER_TOKEN, published.num_shards)
        return shards_for(self._tokens_needed, self._crops, tokens)

    def _how_to_fetch(self, num_shards: int | None = None) -> str:
        if self._chosen:  # as many from the first as have them all
            wanted = [number for number, file in enumerate(self._all_train_files, 1) if file in self.train_files]
            num_shards = max(wanted, default=len(self._chosen.train))
        num_shards = num_shards or self._settings.num_shards or self.num_shards_for(None) or 1
        command = f"nanochat-pl download {self._keys()} num_shards={num_shards}"
        if self._settings.download:
            also = f"{self._key}.download=false keeps to what is here. "
            return f"{also}Fetch it where there is a network: {command}"
        also = f"{self._key}.download=true fetches it while the training runs. " if self._tokens_needed else ""
        return f"{also}Fetch it: {command}"

    def _keys(self) -> str:
        """The keys of a command that mean these files."""
        given = self._settings
        keys: dict[str, str] = {"data": self.name}
        if self.name == "hub":
            keys |= {"data.repo": self._repo} | ({"data.files": given.files} if given.files else {})
        keys |= {"data.revision": self._revision} if self._revision else {}
        return typed_keys(keys | key_of_cache(self._cache_dir))


def key_of_cache(cache_dir: Path) -> dict[str, str]:
    """What a command needs to use the same cache; nothing where it is the usual one."""
    return {} if cache_dir == Path(platformdirs.user_cache_dir("nanochat_pl")) else {"paths.cache": str(cache_dir)}


def typed_keys(keys: Mapping[str, str]) -> str:
    """Keys as they are typed in a shell."""
    return " ".join(shlex.quote(f"{key}={value}") for key, value in keys.items())


def _count(number: float) -> str:
    return f"{number / 1e6:,.1f} million" if number >= 1e6 else f"{number:,.0f}"


def files_of_format(
    manifest: Manifest, pattern: str | None, suffixes: Sequence[str], key: str = "data.files"
) -> list[HubFile]:
    """The files with one of the suffixes that match a glob (None: all), in order; hidden ones are left out.

    Raises:
        UserError: no file matches the glob; names ``key``.
    """
    found = manifest.matching(pattern, key) if pattern else manifest.files
    return [file for file in found if format_of(Path(file.path), suffixes) and not f"/{file.path}".count("/.")]


def _no_documents(manifest: Manifest, pattern: str | None) -> UserError:
    found = manifest.matching(pattern) if pattern else manifest.files
    suffixes = sorted({Path(file.path).suffix for file in found} - {""})
    return UserError(
        f"data.repo={manifest.repo!r}: no file of it ends with {' or '.join(SUFFIXES)}; "
        f"there are {', '.join(suffixes[:8]) or 'none'}."
    )
