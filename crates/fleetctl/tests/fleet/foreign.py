"""Publishes as another program might, with a client library of its own: a JSON array of messages from the standard input,
each {exchange, routingKey, properties, body}. Ends with an error if the broker doesn't confirm one or can't route it."""

import json
import os
import sys

import pika

connection = pika.BlockingConnection(pika.URLParameters(os.environ["AMQP_URL"]))
channel = connection.channel()
channel.confirm_delivery()
for message in json.load(sys.stdin):
    channel.basic_publish(
        message["exchange"],
        message["routingKey"],
        message["body"].encode(),
        pika.BasicProperties(**message["properties"]),
        mandatory=True,
    )
connection.close()
