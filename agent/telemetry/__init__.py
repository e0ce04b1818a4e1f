"""The outbox, the MQTT link and fleet commands."""
