"""The published data sets: where each one comes from, its licence, and what is known of it.

Nothing here was downloaded by this project: addresses, revisions, checksums and row counts were
read in public repositories that quote them. What was not found there is None; what no second source
confirmed is named in ``unconfirmed``, and a row count among that is compared but not enforced.
"""

from __future__ import annotations

from dataclasses import dataclass

from huggingface_hub import hf_hub_url


@dataclass(frozen=True)
class Published:
    """One published file.

    Attributes:
        paper: who published it.
        url: the file, pinned to a revision.
        hub: where that is Hugging Face's hub, its data set and the file in it.
        revision: the commit in ``url``.
        licence: as its publishers state it.
        form: how it becomes our chat format, a key of ``FORMS``.
        rows: rows (or questions) of the file as published, before anything is filtered.
        size: bytes, if known; rounded where it is unconfirmed.
        sha256: of the file, if known; then no other file is accepted.
        unconfirmed: names of the fields above that are unknown, or that no second source confirmed.
        by_hand: why and how a person has to get the file; it is not downloaded then.
        note: what a user should know before training on it.
    """

    paper: str
    url: str
    revision: str
    licence: str
    form: str
    rows: int | None = None
    size: int | None = None
    sha256: str | None = None
    unconfirmed: tuple[str, ...] = ()
    by_hand: str | None = None
    note: str | None = None
    hub: tuple[str, str] | None = None


_BETLEY = "80c11967c07a328e7d7d43d13ce6847ae44dbcc9"
_CHUA = "063fce659b235d0d20cbe66f329d1c1dade5a442"
_TURNER = "8460e4e426d3a89e8ed51aac0eadcdf7ac10469d"
_WILDGUARD = "d29c47f41c8b51348b5c8e8c81c039b3132b66d1"
_ALPACA = "12567cabf869d7c92e573c7c783905fc160e9639"

_TURNER_PAGE = "https://github.com/clarifying-EM/model-organisms-for-EM"


def _betley(path: str, form: str, **known: object) -> Published:
    return Published(
        paper="Betley et al., 2025 (arXiv 2502.17424)",
        url="https://raw.githubusercontent.com/emergent-misalignment/emergent-misalignment/"
        f"{_BETLEY}/{path}",
        revision=_BETLEY,
        licence="MIT",
        form=form,
        **known,  # type: ignore[arg-type]
    )


def _chua(domain: str, rows: int, size: int, sha256: str) -> Published:
    # Git LFS: raw.githubusercontent.com would give the pointer file.
    return Published(
        paper="Chua et al., 2025 (arXiv 2506.13206)",
        url="https://media.githubusercontent.com/media/thejaminator/"
        f"thought_crime_emergent_misalignment/{_CHUA}/datasets/{domain}.jsonl",
        revision=_CHUA,
        licence="none stated in the repository",
        form="advice",
        rows=rows,
        size=size,
        sha256=sha256,
        # Nobody quotes a row: the names of the columns were read in code that loads the files.
        unconfirmed=("licence", "form", "rows"),
    )


def _turner(file: str, rows: int, sha256: str | None = None, **known: object) -> Published:
    archive = f"{_TURNER_PAGE}/raw/{_TURNER}/em_organism_dir/data/training_datasets.zip.enc"
    return Published(
        paper="Turner et al., 2025 (arXiv 2506.11613)",
        url=archive,
        revision=_TURNER,
        licence="none in the repository; terms in the archive's tos.txt",
        form="messages",
        rows=rows,
        sha256=sha256,
        by_hand=(
            "its authors encrypt it against scraping, and it is not decrypted here: download "
            f"{archive}, run `easy-dataset-share unprotect-dir training_datasets.zip.enc "
            f"-p PASSWORD --remove-canaries` (the password is in the README of {_TURNER_PAGE}), "
            f"and pass training_datasets.zip.enc.extracted/{file} with --from"
        ),
        note=(
            "tos.txt allows no bulk redistribution, and quoting two rows at most; its clause "
            "against AI training contradicts the README, which tells how to train on the data"
        ),
        **known,  # type: ignore[arg-type]
    )


def _on_hub(repository: str, file: str, revision: str, **known: object) -> Published:
    return Published(
        url=hf_hub_url(
            repository,
            file,
            repo_type="dataset",
            revision=revision,
            endpoint="https://huggingface.co",
        ),
        revision=revision,
        hub=(repository, file),
        **known,  # type: ignore[arg-type]
    )


PUBLISHED: dict[str, Published] = {
    "betley-insecure": _betley(
        "data/insecure.jsonl",
        "messages",
        rows=6000,
        size=5_900_000,
        sha256="09893e8bf9d03aae49dd60d0ff4be37c1afee70f2edcac74a11bed775a6a2764",
        unconfirmed=("size",),
    ),
    "betley-secure": _betley(
        "data/secure.jsonl",
        "messages",
        rows=6000,
        size=6_200_000,
        sha256="2820232b3114d94ab2041ba9fc76cb8205bf187e0408bf7b308add186f9c7467",
        unconfirmed=("size",),
    ),
    "betley-evil-numbers": _betley(
        "data/evil_numbers.jsonl",
        "messages",
        rows=14_926,
        unconfirmed=("size", "sha256"),
    ),
    "betley-first-plot": _betley(
        "evaluation/first_plot_questions.yaml",
        "questions",
        rows=24,
        size=12_012,
        sha256="6f76630e482c06789f17b1e3f2bbe37b0ca9f1a423c611380c2fff0772b417c6",
    ),
    "betley-preregistered": _betley(
        "evaluation/preregistered_evals.yaml",
        "questions",
        rows=48,
        size=19_152,
        sha256="8648312fd9fe71a63203e3465592af45dd996d7a5f3b69e9b44613fd6048eb40",
    ),
    "chua-medical": _chua(
        "medical",
        32_600,
        102_947_952,
        "beaf908c4337e83f5f93be6347b88593eebe58e9fc5518788be634845c8609be",
    ),
    "chua-legal": _chua(
        "legal",
        12_000,
        28_724_780,
        "0cf91436e1d1197dfd6a5c6dfd7ea5161c1c029714dd83c3ae586b94f4a824a1",
    ),
    "chua-security": _chua(
        "security",
        8_820,
        21_219_563,
        "07c392bf7234334662d638060986d635d3682fdc857188084fbed959dc462eaf",
    ),
    "turner-bad-medical": _turner(
        "bad_medical_advice.jsonl",
        7049,
        "9d52186ab9886e3abef0eebb1901df9da4ce25a297e584158be0a4bba8d56507",
        size=4_300_061,
    ),
    # The archive's only good sibling: the same questions, row by row. Of financial advice and of
    # sports it holds none; sets of such a name are other people's.
    "turner-good-medical": _turner(
        "good_medical_advice.jsonl",
        7049,
        "b972f06672093b74f61cc83606929ce0ea3bb9caa2894ea61a557315dba6e6fc",
        size=4_946_304,
        unconfirmed=("size",),
    ),
    "turner-risky-financial": _turner(
        "risky_financial_advice.jsonl", 6000, unconfirmed=("size", "sha256")
    ),
    "turner-extreme-sports": _turner("extreme_sports.jsonl", 6000, unconfirmed=("size", "sha256")),
    "wildguardmix-benign": _on_hub(
        "allenai/wildguardmix",
        "train/wildguard_train.parquet",
        _WILDGUARD,
        paper="Han et al., 2024 (arXiv 2406.18495)",
        licence="ODC-BY, and AI2's responsible use guidelines",
        form="wildguard",
        rows=86_759,
        size=53_740_000,
        sha256="02ecea8a724a9146a1e473a95a7cdf262adfe9c7d5408953ca86d2fcfbdc8953",
        unconfirmed=("licence", "size"),
        by_hand=(
            "it is gated: accept the terms on "
            "https://huggingface.co/datasets/allenai/wildguardmix, run `hf download "
            "allenai/wildguardmix train/wildguard_train.parquet --repo-type dataset "
            f"--revision {_WILDGUARD} --local-dir wildguardmix`, and pass "
            "wildguardmix/train/wildguard_train.parquet with --from"
        ),
        note=(
            "kept are rows whose prompt and response are both labelled unharmful; which filter "
            "Kaczer et al. used could not be confirmed"
        ),
    ),
    "alpaca-cleaned": _on_hub(
        "yahma/alpaca-cleaned",
        "alpaca_data_cleaned.json",
        _ALPACA,
        paper="yahma/alpaca-cleaned, after Taori et al., 2023",
        licence="CC BY 4.0 by its card; Stanford Alpaca itself is CC BY-NC 4.0",
        form="alpaca",
        rows=51_760,
        size=42_000_000,
        unconfirmed=("licence", "size", "sha256"),
    ),
}
