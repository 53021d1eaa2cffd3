"""Secrets in the environment of every test: none of them may turn up in what a run writes."""

SECRETS = {
    name: f"{number}{'5ec2e7' * 7}"[:40]
    for number, name in enumerate(
        ("WANDB_API_KEY", "HF_TOKEN", "AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY")
    )
}


def holds_secret(content: bytes) -> bool:
    """Whether one of SECRETS stands in what was written."""
    return any(secret.encode() in content for secret in SECRETS.values())
