from locally.cli import main

main()
