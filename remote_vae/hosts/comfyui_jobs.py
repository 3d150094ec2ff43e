"""What happened in the jobs of ComfyUI: node by node, for the picture's metadata and for the node that shows it as a text.

ComfyUI keeps the outputs of nodes, and does not run a node again whose inputs are the same. So what was noted of a node is kept
by all that its output hangs on, and holds for a later job as well.
"""

from __future__ import annotations

import hashlib
import json
import threading
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from remote_vae.history import Record
from remote_vae.hosts.generation import in_words

# Of the entry in the picture's metadata, beside ComfyUI's own "prompt" and "workflow".
METADATA = "remote_vae"
_KEPT = 500
_WEIGHTS = (".safetensors", ".sft", ".ckpt", ".pt", ".pth", ".bin")


@dataclass
class Job:
    """One job, from the moment that ComfyUI takes it from its queue.

    Attributes:
        graph: its nodes by their ids, each with ``class_type`` and ``inputs``; a link is ``[id, number of the output]``.
        metadata: what nodes that save pictures write into them; None: ComfyUI was given none.
    """

    graph: Mapping[str, Any]
    metadata: dict[str, Any] | None = None
    records: dict[str, list[Record]] = field(default_factory=dict)
    words: dict[str, str] = field(default_factory=dict)

    def above(self, node: str) -> set[str]:
        """``node`` and all nodes that its inputs hang on."""
        found: set[str] = set()
        waiting = [node]
        while waiting:
            name = waiting.pop()
            if name in found or name not in self.graph:
                continue
            found.add(name)
            waiting += [str(value[0]) for value in self._inputs(name).values() if isinstance(value, list) and len(value) == 2]
        return found

    def vae_file(self, node: str) -> str:
        """The file of the VAE that ``node`` calls, as its loader names it; "" where that cannot be told."""
        seen: set[str] = set()
        while node in self.graph and node not in seen:
            seen.add(node)
            inputs = self._inputs(node)
            link = inputs.get("vae")
            if isinstance(link, list) and len(link) == 2:
                node = str(link[0])
                continue
            files = [value for value in inputs.values() if _is_weights(value)]
            # A VAE of its own goes before the checkpoint that some loaders take beside it.
            named = [inputs[name] for name in ("vae_name", "ckpt_name") if inputs.get(name) in files]
            return str((named or files or [""])[0]) if named or len(files) == 1 else ""
        return ""

    def key(self, node: str) -> str:
        """Of what makes the output of ``node``; "" for a node that is not in the job as it was queued."""
        if node not in self.graph:
            return ""
        parts = {name: [self.graph[name].get("class_type"), self._inputs(name)] for name in self.above(node)}
        return hashlib.blake2b(json.dumps(parts, sort_keys=True, default=str).encode(), digest_size=16).hexdigest()

    def text(self, node: str) -> str:
        """What was done by the nodes that ``node`` hangs on, one a line; of a node that is not in the graph, by all of them."""
        above = self.above(node)
        lines = {name: words for name, words in self.words.items() if not above or name in above}
        return "\n".join(f"{self._title(name)}: {words}" for name, words in lines.items())

    def write(self) -> None:
        """Put what is known into the metadata."""
        if self.metadata is None:
            return
        if self.words:
            self.metadata[METADATA] = dict(self.words)
        else:
            self.metadata.pop(METADATA, None)

    def _inputs(self, name: str) -> Mapping[str, Any]:
        inputs = self.graph[name].get("inputs")
        return inputs if isinstance(inputs, Mapping) else {}

    def _title(self, name: str) -> str:
        node = self.graph.get(name, {})
        title = (node.get("_meta") or {}).get("title") or node.get("class_type") or "node"
        return f"{title} (node {name})"


def _is_weights(value: object) -> bool:
    return isinstance(value, str) and value.lower().endswith(_WEIGHTS)


class Jobs:
    """The job that runs, and what is known of nodes of earlier ones. May be used from many threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._known: OrderedDict[str, str] = OrderedDict()
        # Kinds of nodes that anything was ever noted of: the keys of all nodes of a large job take a tenth of a second.
        self._kinds: set[Any] = set()
        self.current: Job | None = None

    def begin(self, graph: Mapping[str, Any], metadata: dict[str, Any] | None) -> Job:
        """A job begins; what its nodes did in an earlier one stands in its metadata at once."""
        job = Job(graph, metadata)
        with self._lock:
            for name in (name for name, node in graph.items() if node.get("class_type") in self._kinds):
                words = self._known.get(job.key(name), "")
                if words:
                    job.words[name] = words
            self.current = job
        job.write()
        return job

    def end(self, job: Job) -> None:
        with self._lock:
            if self.current is job:
                self.current = None

    def begins_call(self, job: Job | None, node: str) -> None:
        """``node`` runs after all: what an earlier job knew of it is void."""
        if job is not None and node in job.words and node not in job.records:
            self._note(job, node, "")

    def record(self, job: Job | None, node: str, record: Record, *, names_endpoint: bool) -> None:
        """``node`` has made a VAE call."""
        if job is not None:
            job.records.setdefault(node, []).append(record)
            self._note(job, node, in_words(job.records[node], names_endpoint=names_endpoint))

    def _note(self, job: Job, node: str, words: str) -> None:
        key = job.key(node)
        with self._lock:
            if words:
                self._kinds.add(job.graph.get(node, {}).get("class_type"))
                job.words[node] = words
                self._known[key] = words
                while len(self._known) > _KEPT:
                    self._known.popitem(last=False)
            else:
                job.words.pop(node, None)
                self._known.pop(key, None)
        job.write()
