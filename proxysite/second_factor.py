"""A second factor that each operator may set up: codes of an app (TOTP), and recovery codes for when it is lost."""

from __future__ import annotations

import base64
import io
import secrets
from typing import Any

from django.contrib.auth.models import User
from django.db import transaction
from django_otp.models import Device
from django_otp.plugins.otp_static.models import StaticDevice, StaticToken
from django_otp.plugins.otp_totp.models import TOTPDevice
from qrcode.image.svg import SvgPathFillImage
from qrcode.main import QRCode

RECOVERY_CODES = 10
_NAME = "app"


def is_set_up(user: Any) -> bool:
    """Return whether the user has confirmed an app, and so cannot log in without it."""
    return TOTPDevice.objects.filter(user_id=user.pk, confirmed=True).exists()


def verified(user: Any, code: str) -> Device | None:
    """Return the device whose code this is, which is used up by that; None if it is none, or one too many was tried."""
    code = "".join(code.split()).lower()
    if not code:
        return None
    # A code of the app is six digits; by this each kind of device only counts failures of its own kind.
    kind: type[Device] = TOTPDevice if code.isdecimal() and len(code) == 6 else StaticDevice
    with transaction.atomic():
        for device in kind.objects.filter(user_id=user.pk, confirmed=True).select_for_update():
            if device.verify_token(code):
                found: Device = device
                return found
    return None


def begin(user: User) -> TOTPDevice:
    """Return the user's app that waits to be confirmed, made with a new secret if there is none."""
    device: TOTPDevice
    device, _ = TOTPDevice.objects.get_or_create(user=user, confirmed=False, defaults={"name": _NAME})
    return device


def confirm(user: User, code: str) -> TOTPDevice | None:
    """Take the waiting app into use if the code is its own; None if it is not."""
    with transaction.atomic():
        device: TOTPDevice | None = TOTPDevice.objects.select_for_update().filter(user=user, confirmed=False).first()
        if device is None or not device.verify_token("".join(code.split())):  # type: ignore[no-untyped-call]
            return None
        TOTPDevice.objects.filter(user=user).exclude(pk=device.pk).delete()
        device.confirmed = True
        device.save(update_fields=["confirmed"])
    return device


def renew_recovery_codes(user: User) -> list[str]:
    """Return new recovery codes, each good for one login; those given out before are good no more."""
    with transaction.atomic():
        StaticDevice.objects.filter(user=user).delete()
        device = StaticDevice.objects.create(user=user, name="recovery", confirmed=True)
        codes = [base64.b32encode(secrets.token_bytes(5)).decode().lower() for _ in range(RECOVERY_CODES)]
        StaticToken.objects.bulk_create(StaticToken(device=device, token=code) for code in codes)
    return codes


def recovery_codes_left(user: User) -> int:
    return StaticToken.objects.filter(device__user=user).count()


def remove(user: Any) -> bool:
    """Forget the user's devices and recovery codes; return whether there was an app in use."""
    was_set_up = is_set_up(user)
    with transaction.atomic():
        TOTPDevice.objects.filter(user_id=user.pk).delete()
        StaticDevice.objects.filter(user_id=user.pk).delete()
    return was_set_up


def secret_of(device: TOTPDevice) -> str:
    """Return the secret as people type it into an app: Base32 in groups of four."""
    text = base64.b32encode(device.bin_key).decode().rstrip("=")
    return " ".join(text[start : start + 4] for start in range(0, len(text), 4))


def qr_code(device: TOTPDevice) -> str:
    """Return a picture of the address that sets up an app, as a data: URI; nothing is asked of another host."""
    out = io.BytesIO()
    picture: Any = QRCode(border=2, image_factory=SvgPathFillImage)
    picture.add_data(device.config_url)
    picture.make_image().save(out)
    return "data:image/svg+xml;base64," + base64.b64encode(out.getvalue()).decode()
