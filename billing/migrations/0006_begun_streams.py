from django.db import migrations, models


def fill(apps, schema_editor):
    """Let the averages of what is summed up stay as they were: over all requests."""
    for table in ("keyday", "usageday", "usagehour"):
        schema_editor.execute(f"UPDATE billing_{table} SET begun_streams = requests WHERE first_byte_ms_sum > 0")


class Migration(migrations.Migration):

    dependencies = [
        ('billing', '0005_grants_below_a_billion'),
    ]

    operations = [
        *(
            migrations.AddField(
                model_name=name,
                name='begun_streams',
                # A worker of the version before, which knows no such column, still writes.
                field=models.BigIntegerField(db_default=0, default=0, verbose_name='streams that began'),
            )
            for name in ('keyday', 'usageday', 'usagehour')
        ),
        migrations.RunPython(fill, migrations.RunPython.noop),
    ]
