"""What serve.py needs of HTTP: who may enter, what a request asks, how connections are limited and watched."""
