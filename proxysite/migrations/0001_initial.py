from django.db import migrations, models


class Migration(migrations.Migration):

    initial = True

    dependencies = [
    ]

    operations = [
        migrations.CreateModel(
            name='TaskRun',
            fields=[
                ('id', models.BigAutoField(auto_created=True, primary_key=True, serialize=False, verbose_name='ID')),
                ('task', models.CharField(max_length=200, unique=True, verbose_name='task')),
                ('outcome', models.CharField(choices=[('running', 'running'), ('succeeded', 'succeeded'), ('failed', 'failed')], default='running', max_length=16, verbose_name='outcome')),
                ('last_started_at', models.DateTimeField(verbose_name='last started')),
                ('last_finished_at', models.DateTimeField(null=True, verbose_name='last finished')),
                ('last_succeeded_at', models.DateTimeField(null=True, verbose_name='last succeeded')),
                ('duration_ms', models.BigIntegerField(null=True, verbose_name='duration in ms')),
                ('rows', models.BigIntegerField(null=True, verbose_name='rows')),
                ('detail', models.CharField(blank=True, max_length=300, verbose_name='detail')),
            ],
            options={
                'verbose_name': 'task run',
                'verbose_name_plural': 'task runs',
            },
        ),
    ]
