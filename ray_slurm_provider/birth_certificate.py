"""The birth certificate: what a job carries in its comment, written atomically with its submission.

By it a job is recognised as ours, whatever happened to our own files. Imports the standard library only.
"""

import json
from collections.abc import Mapping
from functools import lru_cache
from types import MappingProxyType
from typing import NamedTuple

from ray_slurm_provider.files import random_name

_PREFIX = "ray-slurm:1:"
_LAST_FIELD = ',"t":"'
_END = '"}'
# A head on the login node has no comment: it carries its certificate in its environment.
CERTIFICATE_VARIABLE = "RAY_SLURM_CERTIFICATE"
# What would end a comment early where SLURM or its tools read it: JSON has another way to write these.
_ESCAPES = str.maketrans({char: f"\\u{ord(char):04x}" for char in "' ="})
# SLURM refuses longer comments (measured, 22.05).
MAX_LENGTH = 1024
_TOKEN_LENGTH = 6


class BirthCertificate(NamedTuple):
    """Whose job this is and what it was born as."""

    cluster: str  # the cluster's name
    home: str  # fingerprint of the cluster's directory: two clusters of one name in two places differ
    token: str  # unique to this submission. SLURM may give a job id out twice; id and token together it cannot.
    head: str = ""  # node id of the head that it works for; "" for a head itself
    tags: Mapping[str, str] = MappingProxyType({})  # Ray's tags at birth

    def text(self) -> str:
        """Return it for ``--comment``: one word of ASCII without single quotes and ``=``.

        Raises:
            ValueError: It is longer than SLURM allows.
        """
        body = json.dumps(
            {"c": self.cluster, "d": self.home, "t": self.token, "h": self.head, "g": dict(self.tags)},
            separators=(",", ":"),
            sort_keys=True,
        )
        text = _PREFIX + body.translate(_ESCAPES)
        if len(text) > MAX_LENGTH:
            raise ValueError(f"the job's comment would have {len(text)} characters; SLURM takes {MAX_LENGTH}")
        return text

    def node_id(self, job_id: str) -> str:
        return f"{job_id}-{self.token}"


def read_certificate(comment: str) -> BirthCertificate | None:
    """Return the certificate in a job's comment, None when there is none of ours."""
    if not comment.startswith(_PREFIX):
        return None
    # The token is what differs between the certificates of a cluster, and it stands last.
    rest, mark, token = comment.rpartition(_LAST_FIELD)
    if not (mark and token.endswith(_END)):
        return None
    common = _read_common(rest)
    token = token[: -len(_END)]
    if common is None or not token.isalnum():
        return None
    return BirthCertificate(common.cluster, common.home, token, common.head, common.tags)


@lru_cache(maxsize=1024)
def _read_common(text: str) -> BirthCertificate | None:
    """Return a certificate without a token from the text before that."""
    try:
        body = json.loads(text[len(_PREFIX) :] + "}")
        return BirthCertificate(
            cluster=str(body["c"]),
            home=str(body["d"]),
            token="",
            head=str(body["h"]),
            tags={str(key): str(value) for key, value in body["g"].items()},
        )
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None


def new_token() -> str:
    return random_name(_TOKEN_LENGTH)


def job_id_of(node_id: str) -> str:
    return node_id.rpartition("-")[0]
