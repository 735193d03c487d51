"""Which corpus of docstrings a run has: the one that it was begun with, whatever is installed meanwhile.

``python_docs`` is made of what is installed, so installing a package makes another corpus. The one of a run stays in
the cache; the run records its hash, and a stage that goes on, the stages after it and its evaluation open that one.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from nanochat_pl.common.console import rank_zero_print
from nanochat_pl.common.errors import UserError
from nanochat_pl.common.files import read_json, write_json
from nanochat_pl.common.schema import build, setting, to_plain
from nanochat_pl.data.sources.python_docs import FOLDER, PythonDocs, open_python_docs


@dataclass(frozen=True)
class ChosenCorpus:
    """The record of a corpus."""

    corpus_hash: str = setting(doc="SHA-256 over all of its documents.", max_length=64)
    folder: str = setting("", "Name of its folder in the cache.", max_length=64)
    python: str = setting("", "Version of Python, and so of the standard library.", max_length=100)
    packages: dict[str, str] = setting(factory=dict, doc="Version of each package outside of the standard library.")

    @classmethod
    def of(cls, corpus: PythonDocs) -> ChosenCorpus:
        versions = corpus.manifest["packages"]
        others = {name: version for name, version in versions.items() if name not in sys.stdlib_module_names}
        return cls(corpus.fingerprint, corpus.folder.name, corpus.manifest["python"], others)

    def differences(self, other: ChosenCorpus) -> str:
        """Which packages came, went or changed their version from this corpus to another, for people."""
        pairs = {name: (self.packages.get(name), other.packages.get(name)) for name in self.packages | other.packages}
        parts = [f"Python {self.python} → {other.python}"] if self.python != other.python else []
        for word, names in (
            ("came", [f"{name} {now}" for name, (was, now) in sorted(pairs.items()) if was is None]),
            ("went", [f"{name} {was}" for name, (was, now) in sorted(pairs.items()) if now is None]),
            (
                "changed",
                [f"{n} {was} → {now}" for n, (was, now) in sorted(pairs.items()) if was and now and was != now],
            ),
        ):
            parts += [f"{word}: {', '.join(names)}"] if names else []
        return "; ".join(parts) or "files of packages have changed under the same versions"


class RunCorpus:
    """The corpus of one stage of a run, opened when it is first asked for.

    Args:
        record: the file where the stage's corpus is recorded; None: nothing is recorded.
        begun: whether the stage has begun, or another process begins it: it keeps to what is recorded.
        inherited: that of the stage before, or of the bundle that is measured.
        may_change: whether a stage that has begun may go on with another corpus where its own is gone.
    """

    def __init__(
        self,
        cache_dir: Path,
        record: Path | None = None,
        begun: bool = False,
        inherited: ChosenCorpus | None = None,
        may_change: bool = False,
    ) -> None:
        self.cache_dir = cache_dir
        self._record, self._begun, self._inherited, self._may_change = record, begun, inherited, may_change

    def reopened(self) -> PythonDocs:
        """The corpus: the recorded one, else the inherited one, else that of the packages that are installed now.

        Raises:
            UserError: the stage has begun, its corpus is not in the cache, and the packages here give another.
        """
        return self._opened

    @cached_property
    def kept(self) -> PythonDocs | None:
        """The corpus that is recorded or inherited; None where there is none, or it is gone and another will do.

        Raises:
            UserError: as :meth:`open`.
        """
        own = read_chosen_corpus(self._record) if self._begun and self._record is not None else None
        chosen = own or self._inherited
        if chosen is None:
            return None
        if found := _find(self.cache_dir, chosen):
            return found
        installed = open_python_docs(self.cache_dir)
        if installed.fingerprint == chosen.corpus_hash:
            return installed
        now = ChosenCorpus.of(installed)
        gone = (
            f"the corpus python_docs {chosen.corpus_hash[:12]} is not in {self.cache_dir / FOLDER} any more, and the"
            f" packages here make another, {now.corpus_hash[:12]}"
            + (f" ({chosen.differences(now)})" if chosen.packages else "")
        )
        if own and not self._may_change:
            raise UserError(
                f"{self._record}: {gone}.",
                "Install these versions again, bring the folder of that corpus back, or begin a new run with run=NEW or"
                " resume=never; or say resume_with_changes=true to go on with the other corpus.",
            )
        rank_zero_print(f"python_docs: {gone}. It is taken instead.")
        return None

    def chosen(self) -> dict[str, Any]:
        """For the record of a bundle: ``{"corpus": …}``, the one that was opened, else the inherited one."""
        chosen = ChosenCorpus.of(self._opened) if "_opened" in self.__dict__ else self._inherited
        return {} if chosen is None else {"corpus": to_plain(chosen)}

    @cached_property
    def _opened(self) -> PythonDocs:
        corpus = self.kept or open_python_docs(self.cache_dir)
        # A stage that was begun before there were records may have had any: the comparison of its data decides.
        if self._record is not None and (not self._begun or (self._may_change and self._record.is_file())):
            write_json(self._record, to_plain(ChosenCorpus.of(corpus)))
        return corpus


def read_chosen_corpus(record: Path) -> ChosenCorpus | None:
    """What is recorded of a stage's corpus; None where nothing is.

    Raises:
        UserError: the record is damaged.
    """
    return build(ChosenCorpus, read_json(record), str(record)) if record.is_file() else None


def corpus_of_bundle(data: Mapping[str, Any], where: str) -> ChosenCorpus | None:
    """What a bundle says of its corpus, ``data`` of its stage.json; None where it has none.

    Raises:
        UserError: it says something else than a record.
    """
    if "corpus" in data:
        return build(ChosenCorpus, data["corpus"], f"{where}: data.corpus")
    if data.get("source") == "python_docs" and isinstance(data.get("fingerprint"), str):
        return build(ChosenCorpus, {"corpus_hash": data["fingerprint"]}, f"{where}: data")  # older than the record
    return None


def _find(cache_dir: Path, chosen: ChosenCorpus) -> PythonDocs | None:
    """The corpus with this hash in the cache; of several, which differ in what is no document, the recorded one."""
    manifests = [path for path in (cache_dir / FOLDER).glob("*/manifest.json") if path.is_file()]
    for path in sorted(manifests, key=lambda path: (path.parent.name != chosen.folder, path)):
        try:
            corpus = PythonDocs(path.parent)
            if corpus.fingerprint == chosen.corpus_hash:
                return corpus
        except (UserError, KeyError, TypeError):  # that of another run: its damage is not this run's matter
            continue
    return None
