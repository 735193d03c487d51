"""What tasks may use besides their settings: folders, the corpus, the sandbox."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from nanochat_pl.common.errors import UserError
from nanochat_pl.data.sources.base import MAX_BAD_FRACTION
from nanochat_pl.data.sources.python_docs import PythonDocs, built_python_docs, open_python_docs
from nanochat_pl.data.sources.run_corpus import RunCorpus

if TYPE_CHECKING:
    from nanochat_pl.tools.sandbox.settings import SandboxSettings


MIXTURE = "mixture.tasks"  # the group of settings that tasks are keys of where nothing else is said


@dataclass(frozen=True)
class TaskContext:
    """Attributes:
    cache_dir: ``paths.cache``: the corpus python_docs, downloaded files, and what was read of files.
    max_bad_fraction: the share of bad rows in files of conversations that is put up with.
    hub: ``paths.hub``: a folder with data sets of a hub, ``datasets/OWNER/NAME/…``, looked at before the cache.
    sandbox: for tasks that run generated code; None: its defaults.
    where: the group that the tasks are keys of, for messages.
    builds_corpus: whether the corpus is built where it is missing, which takes some seconds.
    run_corpus: which corpus the run has; None: that of the packages installed now.
    """

    cache_dir: Path
    max_bad_fraction: float = MAX_BAD_FRACTION
    hub: Path | None = None
    sandbox: SandboxSettings | None = None
    where: str = MIXTURE
    builds_corpus: bool = True
    run_corpus: RunCorpus | None = None

    @cached_property
    def corpus(self) -> PythonDocs:
        """The documentation of the packages, opened when it is first asked for.

        Raises:
            UserError: it cannot be built; or it is not there and is not to be built.
        """
        if self.run_corpus is not None:
            return self.run_corpus.reopened()
        corpus = open_python_docs(self.cache_dir) if self.builds_corpus else built_python_docs(self.cache_dir)
        if corpus is None:
            raise UserError("python_docs: has not been built yet.", "nanochat-pl download data=python_docs")
        return corpus
