"""Small changes, each of which breaks one promise, with the tests that have to notice."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Mutation:
    """One change to one place of the code."""

    promise: int
    breaks: str
    file: str
    old: str
    new: str
    noticed_by: str
    """A test, as pytest names it below ``tests/``; every variant of it that runs must pass before,
    and one at least must fail after."""


SENDING = "integration/test_sending.py"
OFF = "integration/test_off.py"
WRITING = "integration/test_writing.py"
RACES = "integration/test_races.py"
TABLES = "integration/test_tables.py"
RECEIVER = "faults/test_receiver.py"
GRANTS = "integration/test_grants.py"
VERIFY = "integration/test_cli_verify.py"
CONTROL = "integration/test_cli_control.py"
PLACES = "unit/test_deploy_environment.py"
ELSEWHERE = "integration/test_elsewhere.py"
FUTURE = "integration/test_future.py"
ACCESS = "integration/test_facts_access.py"
LINES = "unit/test_line_writer.py"
STDOUT = "faults/test_stdout.py"

MUTATIONS = (
    # 1. Off means off
    Mutation(
        1,
        "the sender does not look at the switch",
        "app/pipeline.py",
        "while isinstance(self._gate, Enabled) and not self._stopping.is_set():",
        "while not self._stopping.is_set():",
        f"{OFF}::test_what_was_pending_is_discarded_and_never_leaves",
    ),
    Mutation(
        1,
        "a heartbeat is written although telemetry is off",
        "app/pipeline.py",
        "if isinstance(self._gate, Disabled) or time.monotonic() < self._write_not_before:",
        "if time.monotonic() < self._write_not_before:",
        f"{OFF}::test_no_table_of_consentos_is_read",
    ),
    Mutation(
        1,
        "what is pending is kept for when telemetry is on again",
        "app/pipeline.py",
        'return ended + _discarded(outbox.discard_all(connection), "off")',
        "return ended",
        f"{OFF}::test_what_was_pending_is_discarded_and_never_leaves",
    ),
    Mutation(
        1,
        "the notice is given although telemetry is off",
        "app/pipeline.py",
        """            if isinstance(self._gate, Enabled):
                self._give_notice(connection)""",
        "            self._give_notice(connection)",
        f"{OFF}::test_a_new_install_that_is_off_leaves_no_trace_at_all",
    ),
    Mutation(
        1,
        "a word that is none means on",
        "app/settings/__init__.py",
        "            if variable not in _FALLBACKS and variable not in _CONNECTIONS:",
        "            if variable in ():",
        "unit/test_settings.py::test_any_other_word_for_enabled_is_off",
    ),
    Mutation(
        1,
        "a misspelt name is not noticed",
        "app/settings/__init__.py",
        "        yield from self._misspelt\n",
        "",
        "unit/test_settings.py::test_any_other_name_of_telemetry_is_off",
    ),
    Mutation(
        1,
        "an environment with a runner's quotes or comment in it means on",
        "app/settings/__init__.py",
        "elif not PLAIN_WORD.fullmatch(self.environment):",
        "elif not self.environment:",
        "unit/test_settings.py"
        "::test_an_environment_that_is_not_one_plain_word_is_off_and_is_not_repeated",
    ),
    Mutation(
        1,
        "an orphaned worker goes on with the environment of before",
        "workers/broker.py",
        "        _stop_without(master)\n",
        "",
        "faults/test_shutdown.py::test_an_orphan_of_a_killed_master_stops_so_that_off_can_mean_off",
    ),
    Mutation(
        1,
        "rotating makes a new id although telemetry is off",
        "app/control.py",
        "instance.ensure(connection) if known and enabled else None",
        "instance.ensure(connection) if known else None",
        f"{CONTROL}::test_makes_no_id_while_telemetry_is_off_and_says_so",
    ),
    Mutation(
        1,
        "compose writes the switch over the operator's file",
        "deploy/compose.yaml",
        "    command: [python, -m, workers.solo]\n",
        "    command: [python, -m, workers.solo]\n    environment: {TELEMETRY_ENABLED: true}\n",
        f"{PLACES}::test_a_variable_reaches_the_process",
    ),
    Mutation(
        1,
        "the chart passes on only the variables that it has heard of",
        "deploy/helm/templates/configmap.yaml",
        ":= .Values.env }}",
        ':= pick .Values.env "TELEMETRY_ENABLED" "ENVIRONMENT" }}',
        f"{PLACES}::test_a_variable_reaches_the_process",
    ),
    # 2. What you audit is what left
    Mutation(
        2,
        "the attempt is written after the POST",
        "app/sender.py",
        """        begun = begin()
        return post(target, body, at=begun, stopping=stopping) if begun else None""",
        """        sent = post(target, body, at=datetime.now(UTC), stopping=stopping)
        return sent if begin() else None""",
        f"{SENDING}::test_the_attempt_is_on_record_before_the_first_byte_leaves",
    ),
    Mutation(
        2,
        "the body is composed anew for the POST",
        "app/delivery.py",
        'body.encode("ascii"),',
        "json.dumps(json.loads(body)).encode(),",
        f"{SENDING}::test_row_request_and_log_hold_the_same_bytes",
    ),
    Mutation(
        2,
        "the log composes the body anew",
        "app/delivery.py",
        "log.payload(self._claim.body)",
        "log.payload(json.dumps(json.loads(self._claim.body)))",
        f"{SENDING}::test_row_request_and_log_hold_the_same_bytes",
    ),
    Mutation(
        2,
        "the database tidies the body up",
        "migrations/telemetry/0001_outbox.py",
        "payload json NOT NULL",
        "payload jsonb NOT NULL",
        f"{TABLES}::test_the_payload_is_kept_as_the_text_it_is",
    ),
    Mutation(
        2,
        "a stored body can be changed",
        "migrations/telemetry/0001_outbox.py",
        "    op.execute(FREEZE)\n",
        "",
        f"{TABLES}::test_day_instance_and_payload_never_change",
    ),
    Mutation(
        2,
        "what has left may be forgotten in a crash of the database's server",
        "app/database.py",
        "nullif(current_setting('synchronous_commit'), 'off')",
        "nullif(current_setting('synchronous_commit'), '')",
        "faults/test_durability.py"
        "::test_an_attempt_outlives_a_server_that_does_not_wait_for_its_disk",
    ),
    Mutation(
        2,
        "the small role may change a payload",
        "app/grants.py",
        '        "UPDATE": (\n            "state",',
        '        "UPDATE": (\n            "payload",\n            "state",',
        f"{GRANTS}::test_cannot_change_what_was_written",
    ),
    Mutation(
        2,
        "a trigger that is disabled is taken for one that stands",
        "app/outbox.py",
        " AND tgenabled IN ('O', 'A')",
        "",
        f"{VERIFY}::test_is_missed_where_it_is_weaker_in_any_way",
    ),
    Mutation(
        2,
        "a gap in the attempts is not found",
        "app/verification.py",
        'if numbers != [*range(1, row["attempts"] + 1)]:',
        'if len(numbers) > row["attempts"]:',
        f"{VERIFY}::test_each_row_that_is_not_as_it_was_written_is_named_and_its_body_is_not_repeated",
    ),
    Mutation(
        2,
        "a logged body that is not stored is not found",
        "app/verification.py",
        "if each.body not in stored:",
        "if not stored:",
        f"{VERIFY}::test_a_logged_body_that_is_not_stored_is_named_by_its_line_and_not_repeated",
    ),
    Mutation(
        2,
        "a row that was sent and not logged is not found",
        "app/verification.py",
        'if sent and row["payload"] not in told:',
        "if sent and not told:",
        f"{VERIFY}::test_what_has_left_must_be_logged_even_where_its_row_was_not_sent_in_time",
    ),
    Mutation(
        2,
        "a line is handed over and not waited for",
        "app/line_writer.py",
        "if not self._behind and not written.wait(PATIENCE):",
        "if not self._behind and not written.wait(0):",
        f"{LINES}::test_a_line_is_out_when_the_call_returns",
    ),
    Mutation(
        2,
        "what a non-blocking stdout does not take is dropped",
        "app/line_writer.py",
        "            is_writable(self._descriptor, seconds=None)\n            return 0\n",
        "            return len(some)\n",
        f"{LINES}::test_lines_that_had_to_wait_come_whole_and_in_order",
    ),
    # 3. One a day
    Mutation(
        3,
        "a day may have two rows",
        "migrations/telemetry/0001_outbox.py",
        "day date NOT NULL UNIQUE",
        "day date NOT NULL",
        f"{TABLES}::test_a_day_has_one_row",
    ),
    Mutation(
        3,
        "two workers may claim the same row",
        "app/outbox.py",
        """        .limit(1)
        .with_for_update(skip_locked=True)
""",
        "        .limit(1)\n",
        f"{RACES}::test_eight_workers_claim_five_hundred_rows_each_once",
    ),
    Mutation(
        3,
        "the settle does not show the lease's token",
        "app/outbox.py",
        "        .where(_row.id == claim.id, _row.lease_token == claim.token)\n",
        "        .where(_row.id == claim.id)\n",
        f"{SENDING}::test_whoever_lost_it_changes_nothing_but_the_attempt",
    ),
    Mutation(
        3,
        "a lease is taken back before it lapses",
        "app/outbox.py",
        '.where(_row.state == "sending", ~_held)',
        '.where(_row.state == "sending")',
        f"{SENDING}::test_one_that_lapsed_is_taken_back_and_the_same_bytes_go_out",
    ),
    Mutation(
        3,
        "the expiry is not checked before a POST",
        "app/outbox.py",
        """            _held,
            _row.expires_at > _now,
""",
        "            _held,\n",
        f"{SENDING}::test_a_try_does_not_follow_when_the_day_ends_in_between",
    ),
    Mutation(
        3,
        "the lease is not checked before a POST",
        "app/outbox.py",
        "            _held,\n            _row.expires_at",
        "            _row.expires_at",
        f"{SENDING}::test_a_try_does_not_follow_when_it_has_lapsed_in_between",
    ),
    Mutation(
        3,
        "the instance id is not checked before a POST",
        "app/outbox.py",
        """            _row.expires_at > _now,
            _of_this_instance,
            ~_sent_already,
""",
        """            _row.expires_at > _now,
            ~_sent_already,
""",
        f"{SENDING}::test_a_try_does_not_follow_when_the_instance_is_wiped_in_between",
    ),
    Mutation(
        3,
        "a send by another program is not looked at again before an attempt",
        "app/outbox.py",
        "            ~_sent_already,\n",
        "",
        f"{ELSEWHERE}::test_no_attempt_begins_once_another_program_has_sent_the_day",
    ),
    Mutation(
        3,
        "what was sent under a lost lease is sent again",
        "app/outbox.py",
        "            ~_sent_by_us,\n",
        "",
        f"{ELSEWHERE}::test_what_was_sent_under_a_lease_that_was_lost_is_not_sent_again",
    ),
    Mutation(
        3,
        "a time in the future is believed",
        "app/schedule.py",
        "return at if at is None or at <= now + CLOCKS_DIFFER else None",
        "return at or (None if now else at)",
        f"{FUTURE}::test_keeps_no_heartbeat_from_being_written_and_sent",
    ),
    Mutation(
        3,
        "a notice in the future is not given anew",
        "app/notice.py",
        "            where=NOTICE.c.noticed_at > func.now() + CLOCKS_DIFFER,\n",
        "            where=NOTICE.c.noticed_at < func.now() - CLOCKS_DIFFER,\n",
        f"{FUTURE}::test_is_given_anew_and_counts_from_then_on",
    ),
    Mutation(
        3,
        "a send by another program is not looked at",
        "app/schedule.py",
        "    if sent is not None and sent >= opens:",
        "    if sent is None and not opens:",
        f"{WRITING}::test_what_something_else_has_sent_is_not_sent_again",
    ),
    Mutation(
        3,
        "a heartbeat is written for a half past two before its notice",
        "app/schedule.py",
        "    if not waive_notice and (noticed is None or noticed >= opens):",
        "    if not waive_notice and noticed is None:",
        "unit/test_schedule.py::test_one_rule_decides_every_write",
    ),
    Mutation(
        3,
        "two first boots look for the instance as of one moment",
        "app/database.py",
        '        isolation_level="READ COMMITTED",\n',
        "",
        f"{RACES}::test_sixteen_first_boots_make_one_instance",
    ),
    Mutation(
        3,
        "a late answer puts an older time over a newer one",
        "app/instance.py",
        "later = func.greatest(INSTANCE.c.last_telemetry_at, at)",
        "later = func.greatest(at, at)",
        "faults/test_races.py::test_lets_the_late_finisher_change_nothing_but_its_attempt",
    ),
    Mutation(
        3,
        "a stamp that fails undoes the settling",
        "app/delivery.py",
        "            if error.connection_invalidated:\n                raise\n",
        "            raise\n",
        f"{SENDING}::test_an_instance_that_somebody_holds_is_not_stamped_and_nothing_leaves_again",
    ),
    Mutation(
        3,
        "what was on its way when a process died is not sent again",
        "app/pipeline.py",
        "        lapsed = outbox.reclaim(connection, random.random())  # noqa: S311 - jitter\n",
        "        lapsed: list[UUID] = []\n",
        "faults/test_crashes.py"
        "::test_killed_between_the_answer_and_the_settle_it_leaves_again_and_is_collected_once",
    ),
    Mutation(
        3,
        "a row that kills its worker outlives its day",
        "app/pipeline.py",
        "        expired = outbox.expire(connection)\n",
        "        expired: list[Row[UUID, date]] = []\n",
        "faults/test_crashes.py"
        "::test_is_tried_ever_more_rarely_and_ends_with_its_day_and_the_next_day_goes_out",
    ),
    Mutation(
        3,
        "a write does not wait for who holds the outbox, nor is it waited for",
        "app/pipeline.py",
        "                outbox.enter(connection)\n",
        "",
        f"{CONTROL}::test_is_waited_for_while_it_is_counted",
    ),
    Mutation(
        3,
        "who forgets or rotates does not hold the outbox",
        "app/control.py",
        "        outbox.hold(connection)\n",
        "",
        f"{CONTROL}::test_is_waited_for_while_it_is_counted",
    ),
    Mutation(
        3,
        "what is forgotten is followed by another heartbeat for the same day",
        "app/control.py",
        "        notice.remove(connection)\n",
        "",
        f"{CONTROL}::test_lets_no_heartbeat_follow_before_a_new_notice_and_a_new_day",
    ),
    Mutation(
        3,
        "the notice does not name what is new",
        "app/pipeline.py",
        'return ",".join(change.new_fields(last["payload"])) or None if last else "all"',
        'return "all"',
        "acceptance/test_upgrade.py::test_what_is_new_is_read_before_it_leaves",
    ),
    # 4. Nothing else
    Mutation(
        4,
        "a heartbeat takes fields that nobody described",
        "app/payload.py",
        'extra="forbid"',
        'extra="allow"',
        "unit/test_payload_closed.py::test_an_unknown_field_is_refused_at_any_depth",
    ),
    Mutation(
        4,
        "one more header leaves",
        "app/sender.py",
        '        "Accept": "*/*",\n',
        '        "Accept": "*/*",\n        "X-Host": socket.gethostname(),\n',
        f"{SENDING}::test_nothing_but_the_seven_headers_is_sent",
    ),
    Mutation(
        4,
        "redirects are followed",
        "app/sender.py",
        "follow_redirects=False",
        "follow_redirects=True",
        f"{RECEIVER}::test_a_redirect_leads_nowhere",
    ),
    Mutation(
        4,
        "the small role may read a domain",
        "app/grants.py",
        '"sites": {"SELECT": ("id",',
        '"sites": {"SELECT": ("domain", "id",',
        f"{GRANTS}::test_cannot_read_any_column_that_is_not_counted",
    ),
    Mutation(
        4,
        "the small role has a right that nothing needs",
        "app/grants.py",
        '"UPDATE": ("noticed_at",),',
        '"UPDATE": ("noticed_at",), "DELETE": WHOLE,',
        f"{GRANTS}::test_is_missed_where_it_is_taken_away",
    ),
    # 5. It never hurts its host
    Mutation(
        5,
        "two installs on one Redis share their wake-ups",
        "app/settings/__init__.py",
        'return f"consentos-telemetry-{sha256(database.encode()).hexdigest()[:8]}"',
        'return f"consentos-telemetry-{sha256(database[:0].encode()).hexdigest()[:8]}"',
        "acceptance/test_sharing.py"
        "::test_workers_of_another_install_take_none_of_this_ones_wake_ups",
    ),
    Mutation(
        5,
        "each try through a silent SOCKS proxy leaves a connection open",
        "app/sender.py",
        "            transport.abort()",
        "            transport.get_extra_info(None)",
        "integration/test_proxies.py"
        "::test_a_proxy_that_is_silent_is_left_at_the_deadline_and_hung_up_on",
    ),
    Mutation(
        5,
        "white space around a URL makes it useless",
        "app/settings/words.py",
        "value.strip() if isinstance(value, str) else value",
        "value",
        "unit/test_settings_urls.py::test_white_space_around_any_url_is_dropped",
    ),
    Mutation(
        5,
        "of several hosts the first has to be alive",
        "app/settings/urls.py",
        """            options.append(("host", ",".join(self.hosts)))""",
        """            options.append(("host", ",".join([host] * len(self.hosts))))""",
        "integration/test_connecting.py::test_a_database_is_reached_by_every_spelling",
    ),
    Mutation(
        5,
        "Celery's URL of a Redis over TLS is refused",
        "app/settings/urls.py",
        "return SecretStr(_CELERYS_WORD.sub(lambda word: word[1].lower(), url))",
        "return SecretStr(url)",
        "acceptance/test_sharing.py"
        "::test_a_redis_that_celery_reaches_over_tls_is_reached_by_the_same_url",
    ),
    Mutation(
        5,
        "a failure leaves its actor",
        "workers/actors.py",
        '        log.event("failed", level=logging.WARNING, stage=stage, error=log.cause(error))\n',
        '        log.event("failed", level=logging.WARNING, stage=stage, error=log.cause(error))\n'
        "        raise\n",
        "acceptance/test_procfile.py::test_a_worker_before_the_release_says_what_to_do_and_stays",
    ),
    Mutation(
        5,
        "a POST has no total deadline",
        "app/sender.py",
        "        asyncio.timeout(target.timeout),\n",
        "        asyncio.timeout(None),\n",
        f"{RECEIVER}::test_one_that_misbehaves_is_told_in_a_word_and_left_at_the_deadline",
    ),
    Mutation(
        5,
        "the response's body is read",
        "app/sender.py",
        '        return response.status_code, response.headers.get("Retry-After")',
        """        await response.aread()
        return response.status_code, response.headers.get("Retry-After")""",
        f"{RECEIVER}::test_an_answers_body_is_not_read",
    ),
    Mutation(
        5,
        "a lock is waited for without end",
        "app/database.py",
        "set_config('lock_timeout', '1s', true)",
        "set_config('lock_timeout', '0', true)",
        "integration/test_facts_access.py"
        "::test_waits_a_second_for_a_locked_table_and_writes_nothing",
    ),
    Mutation(
        5,
        "a slow count is waited for without end",
        "app/database.py",
        "set_config('statement_timeout', '5s', true)",
        "set_config('statement_timeout', '0', true)",
        "integration/test_facts_access.py::test_gives_up_on_a_table_that_is_too_slow_to_count",
    ),
    Mutation(
        5,
        "a count goes past the top bucket",
        "app/facts.py",
        "SELECT FROM users WHERE deleted_at IS NULL LIMIT 10000",
        "SELECT FROM users WHERE deleted_at IS NULL",
        "integration/test_facts.py::test_no_count_goes_past_it",
    ),
    Mutation(
        5,
        "a transaction stays open during the POST",
        "app/delivery.py",
        "        outcome = sender.deliver(\n",
        "        held = self._transaction()\n        held.__enter__()\n"
        "        outcome = sender.deliver(\n",
        f"{SENDING}::test_no_transaction_is_open_during_the_post",
    ),
    Mutation(
        5,
        "a second signal kills a running actor",
        "workers/broker.py",
        "        _stop_once()\n",
        "",
        "faults/test_shutdown.py::test_a_post_on_its_way_is_settled_before_the_end",
    ),
    Mutation(
        5,
        "an idle worker hears of a stop when Redis has let it wait to the end",
        "workers/broker.py",
        """                    if stopping.is_set():
                        break
""",
        "",
        "faults/test_shutdown.py::test_a_post_on_its_way_is_settled_before_the_end",
    ),
    Mutation(
        5,
        "a solo that is told to stop lets its POST go on",
        "workers/scheduler.py",
        "            stopping.set()\n",
        "            pass\n",
        "faults/test_shutdown.py::test_a_post_on_its_way_is_settled_before_the_end",
    ),
    Mutation(
        5,
        "a sweep waits for a row that somebody holds",
        "app/outbox.py",
        """        .where(_row.state == "pending", which)
        .with_for_update(skip_locked=True)
""",
        """        .where(_row.state == "pending", which)
        .with_for_update()
""",
        "faults/test_database.py::test_a_row_that_somebody_holds_does_not_keep_the_sweep_from_the_others",
    ),
    Mutation(
        5,
        "the connection of a claim is held through the POST",
        "app/delivery.py",
        "        self._let_go()\n",
        "",
        f"{SENDING}::test_no_transaction_is_open_during_the_post",
    ),
    Mutation(
        5,
        "a connection that has died is used again",
        "app/database.py",
        "        connection.invalidate()\n",
        "        return connection\n",
        "faults/test_database.py::test_between_the_claim_and_the_post_it_is_not_even_noticed",
    ),
    Mutation(
        5,
        "tables are made before ConsentOS has made its own",
        "migrations/__init__.py",
        'if to != "base" and (refusal := host.unready(connection)):',
        'if to == "nowhere" and (refusal := host.unready(connection)):',
        "integration/test_migrations.py"
        "::test_without_consentos_one_sentence_says_to_migrate_it_first",
    ),
    Mutation(
        5,
        "tables that are half there stay so",
        "migrations/__init__.py",
        'if to != "base" and not (to == "head" and repair.missing(connection)):',
        'if to != "base":',
        "integration/test_half_there.py::test_is_made_whole_and_what_is_left_is_kept",
    ),
    Mutation(
        5,
        "a connection that answers nothing is waited for without end",
        "app/database.py",
        "return super().wait(gen, interval, timeout or self.patience)",
        "return super().wait(gen, interval, timeout)",
        "faults/test_database.py"
        "::test_a_connection_that_stays_open_and_answers_nothing_is_given_up_and_work_goes_on",
    ),
    Mutation(
        5,
        "every line waits for a reader who is not there",
        "app/line_writer.py",
        "            self._behind = True\n",
        "            pass\n",
        f"{LINES}::test_a_blocked_reader_is_waited_for_once",
    ),
    Mutation(
        5,
        "the log waits for its reader without end",
        "app/line_writer.py",
        "not written.wait(PATIENCE)",
        "not written.wait()",
        f"{STDOUT}::test_does_not_hold_up_the_stop_of_a_scheduler",
    ),
    Mutation(
        5,
        "a blocked log keeps every line",
        "app/line_writer.py",
        "if self._waiting >= MOST_WAITING:",
        "if self._waiting < 0:",
        f"{LINES}::test_a_blocked_log_takes_no_more_than_so_much_memory",
    ),
    Mutation(
        5,
        "with stdout closed there is no log",
        "app/log.py",
        "    closed = sys.__stdout__ is None and stream in {None, sys.stdout}\n",
        "    closed = False\n",
        f"{STDOUT}::test_has_the_log_go_to_stderr_and_the_heartbeat_out",
    ),
    Mutation(
        5,
        "a socket takes the place of a closed stdout",
        "app/log.py",
        "    streams.ensure()\n",
        "",
        f"{STDOUT}::test_is_not_where_the_next_socket_is_opened",
    ),
    # 6. No silent failure
    Mutation(
        6,
        "a version that stays behind an upgrade is not noticed",
        "app/pipeline.py",
        '.get("version") != settings.app_version:',
        '.get("version") == settings.app_version:',
        "integration/test_host_revision.py"
        "::test_a_version_that_stays_behind_an_upgrade_is_warned_about_every_day_until_it_is_set",
    ),
    Mutation(
        6,
        "the HTTP client reads NO_PROXY itself, and fails at what it does not understand",
        "app/sender.py",
        """            proxy=proxy or None,
            trust_env=False,
""",
        "",
        "integration/test_proxies.py::test_no_entry_of_no_proxy_keeps_a_post_from_leaving",
    ),
    Mutation(
        6,
        "a network in NO_PROXY is not understood",
        "app/settings/proxy.py",
        "return is_address(host) and ip_address(host) in addresses",
        "return False",
        "integration/test_proxies.py::test_no_proxy_leads_past_the_proxy",
    ),
    Mutation(
        6,
        "a proxy that cannot be understood is ignored without a word",
        "app/settings/__init__.py",
        "        yield from self._proxy.warnings\n",
        "",
        "unit/test_settings_proxy.py"
        "::test_a_proxy_that_cannot_be_understood_is_named_and_ignored_and_not_repeated",
    ),
    Mutation(
        6,
        "a version that is not set is sent as 0.0.0-dev without a word",
        "app/settings/__init__.py",
        'if "app_version" not in self.model_fields_set:',
        "if False:",
        "unit/test_settings.py"
        "::test_a_version_that_is_not_set_earns_a_warning_and_telemetry_stays_on",
    ),
    Mutation(
        6,
        "the v of a git tag makes a version unknown",
        "app/settings/__init__.py",
        'str(value).removeprefix("v")',
        "str(value)",
        "unit/test_settings.py::test_a_version_is_sent_without_the_v_of_its_git_tag",
    ),
    Mutation(
        6,
        "an attempt is not logged",
        "app/delivery.py",
        "            self._log_attempt(outcome, ended.next_attempt_at)\n",
        "            pass\n",
        f"{SENDING}::test_every_attempt_line_has_the_words_that_operators_grep",
    ),
    Mutation(
        6,
        "an attempt's outcome is not recorded",
        "app/delivery.py",
        "        outbox.record(connection, self._attempt, outcome)\n        if outcome.result",
        "        if outcome.result",
        f"{SENDING}::test_the_attempt_is_on_record_before_the_first_byte_leaves",
    ),
    Mutation(
        6,
        "a failure is swallowed without a word",
        "workers/actors.py",
        '        log.event("failed", level=logging.WARNING, stage=stage, error=log.cause(error))\n',
        "        del stage, error\n",
        "acceptance/test_procfile.py::test_a_worker_before_the_release_says_what_to_do_and_stays",
    ),
    Mutation(
        6,
        "an outcome is forgotten when the database fails for a moment",
        "app/delivery.py",
        "PATIENCE_WITH_DATABASE = (0.5, 1.0, 2.0)",
        "PATIENCE_WITH_DATABASE = ()",
        "faults/test_database.py::test_a_settle_that_fails_once_is_tried_again",
    ),
    Mutation(
        6,
        "a right that is not needed is not told",
        "app/grants.py",
        "elif needed is None or (needed and column not in needed):",
        "elif needed is None:",
        f"{GRANTS}::test_tells_each_right_that_is_not_needed",
    ),
    Mutation(
        6,
        "lines of the log that were dropped are not reported",
        "app/line_writer.py",
        "                self._report_loss()\n",
        "",
        f"{LINES}::test_lines_beyond_the_most_that_may_wait_are_reported_as_lost",
    ),
    Mutation(
        6,
        "a worker ends without a word about unread lines",
        "workers/broker.py",
        "        Finalize(None, logging.shutdown, exitpriority=0)",
        "        pass",
        f"{STDOUT}::test_lines_that_nobody_has_read_by_the_end_are_reported_on_stderr",
    ),
    # 7. The broker may lose anything
    Mutation(
        7,
        "whom a wake-up wakes takes it away from whom it is for",
        "workers/broker.py",
        'send_command("BRPOPLPUSH", queue, queue, IDLE_SECONDS)',
        'send_command("BRPOPLPUSH", queue, f"{queue}.taken", IDLE_SECONDS)',
        "acceptance/test_procfile.py"
        "::test_the_schedulers_own_sweep_has_the_days_heartbeat_written_and_sent",
    ),
    Mutation(
        7,
        "the scheduler ends when Redis is away",
        "workers/scheduler.py",
        "except (BrokerError, RedisError) as failure:",
        "except MemoryError as failure:",
        "faults/test_broker.py::test_processes_that_start_without_redis_wait_for_it_and_then_work",
    ),
    Mutation(
        7,
        "the sweep does not wake the sender",
        "workers/actors.py",
        "    if due:\n",
        "    if not due:\n",
        "acceptance/test_procfile.py"
        "::test_the_schedulers_own_sweep_has_the_days_heartbeat_written_and_sent",
    ),
    Mutation(
        7,
        "a wake-up that could not be sent is not tried again",
        "workers/scheduler.py",
        "[actor for actor in self._unsent if self._try_to_send(actor, now)]",
        "[]",
        "faults/test_broker.py"
        "::test_a_wake_up_that_cannot_be_sent_at_its_minute_is_sent_as_soon_as_redis_is_back",
    ),
    Mutation(
        7,
        "a Redis that hangs is waited for without end",
        "app/wakeups.py",
        "            socket_timeout=TIMEOUT,\n",
        "            socket_timeout=None,\n",
        "faults/test_broker.py"
        "::test_an_actor_ends_its_work_without_redis_and_the_worker_takes_the_next",
    ),
    # 8. A count is true or it is not sent
    Mutation(
        8,
        "rows that a policy hides count as missing",
        "app/database.py",
        "set_config('row_security', 'off', true)",
        "set_config('row_security', 'on', true)",
        f"{ACCESS}::test_is_refused_with_its_reason_in_the_log_and_in_status",
    ),
    Mutation(
        8,
        "a view is counted in the place of a table",
        "app/facts.py",
        "relkind IN ('r', 'p') AS is_table",
        "true AS is_table",
        f"{ACCESS}::test_is_refused_with_its_reason_in_the_log_and_in_status",
    ),
    Mutation(
        8,
        "a table of another program is counted",
        "app/facts.py",
        "if len({relation.schema for relation in found}) > 1:",
        "if not found:",
        f"{ACCESS}::test_is_refused_with_its_reason_in_the_log_and_in_status",
    ),
)
