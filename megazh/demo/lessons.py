"""Plots with a lesson: helping, sharing, a skill, a market, a riddle, a tree, the truth. All arithmetic is right."""

from megazh.demo.words import FRUITS, VILLAGE, Frame, Teller, they


def _help(t: Teller) -> Frame:
    """A child in a hurry stops to help."""
    a, elder = *t.children(1), t.elder()
    goal, answer = t.one(
        (
            ("去看木偶戏", "木偶戏刚刚开始"),
            ("去参加生日会", "大家正等着切蛋糕"),
            ("去看球赛", "球赛才开始一会儿"),
            ("去上音乐课", "老师正准备唱第一首歌"),
            ("去听故事会", "故事才讲了个开头"),
        )
    )
    load, piece = t.one(
        (
            ("背着一筐白菜", "一棵白菜"),
            ("背着一袋土豆", "一个土豆"),
            ("提着一篮鸡蛋", "一个鸡蛋"),
            ("推着一车西瓜", "一个西瓜"),
            ("提着一篮子苹果", "一个苹果"),
            ("背着一筐萝卜", "一根萝卜"),
        )
    )
    minutes = t.between(2, 6) * 5
    t.opening("夏天", "秋天")
    t.tell(f"{a.full}高高兴兴地{goal}。", f"{a.full}急着{goal}，走得很快。", f"吃过饭，{a.full}独自{goal}。")
    t.tell(
        f"走到半路，{a.pronoun}看见{elder.full}{load}，累得满头大汗。",
        f"路上，{a.pronoun}遇见了{elder.full}。{elder.full}{load}，走几步就要歇一歇。",
    )
    t.paragraph()
    t.tell(
        f"{a.name}心想：要是帮忙，就会迟到；可是不帮忙，{elder.full}怎么办呢？",
        f"{a.name}有点儿着急，可是看看{elder.full}，又停下了脚步。",
    )
    t.tell(f"{a.name}说：“{elder.full}，我来帮您吧！”", f"“{elder.full}，我帮您送回家！”{a.name}大声说。")
    t.tell(
        f"{they(a, elder)}走了{t.count(minutes, '分钟')}，终于到了{elder.full}的家。",
        f"上坡的时候，{a.name}一步也不敢松手；下坡的时候，{a.pronoun}小心地扶着，"
        f"用了{t.count(minutes, '分钟')}才走到。",
    )
    t.perhaps(f"{a.name}的手酸了，脸也红了，心里却很高兴。", f"一路上，{piece}也没有掉。")
    t.paragraph()
    t.tell(
        f"{elder.full}笑着说：“好孩子，谢谢你！”还送给{a.pronoun}{t.count(t.between(2, 9), '颗')}糖。",
        f"{elder.full}摸着{a.name}的头说：“真是个好孩子，没有你，我天黑也到不了家。”",
    )
    t.tell(f"{a.name}赶到的时候，{answer}。", f"{a.name}跑得飞快，赶到一看，{answer}。")
    t.tell(
        f"大家听了这件事，都为{a.pronoun}鼓掌。",
        f"朋友们知道了，都说{a.name}做得对。",
        f"{a.name}觉得，这是最快乐的一天。",
    )
    return (
        (f"迟到的{a.name}", load[2:], f"{a.name}帮忙"),
        ("帮助别人，自己也会快乐。", "看见别人有困难，要伸出手来。", "迟到一会儿不要紧，帮助别人更重要。"),
    )


def _share(t: Teller) -> Frame:
    """Two children pick fruit and share it equally. Sum, quotient and remainder are right."""
    a, b, *others = t.children(t.between(2, 4))
    elder, (fruit, season) = t.elder(), t.one(FRUITS)
    x, y, extra = t.between(4, 20), t.between(3, 20), t.between(1, 6) if t.chance(0.4) else 0
    total, heads = x + y + extra, 2 + len(others)
    each, left = divmod(total, heads)
    t.tell(
        f"{season}到了，{fruit}熟了。", f"{season}的果园里，{fruit}挂满了枝头。" if fruit != "草莓" else "草莓红了。"
    )
    t.tell(
        f"{a.full}和{b.full}提着篮子去摘{fruit}。",
        f"{elder.full}请{a.full}和{b.full}去园子里摘{fruit}。",
    )
    t.tell(
        f"{a.name}摘了{t.count(x, '个')}，{b.name}摘了{t.count(y, '个')}。",
        f"{a.name}数了数，自己摘了{t.count(x, '个')}；{b.name}也数了数，摘了{t.count(y, '个')}。",
    )
    plus = ""
    if extra:
        t.tell(
            f"{elder.full}看见了，又送来{t.count(extra, '个')}。",
            f"{elder.full}又给了{they(a, b)}{t.count(extra, '个')}。",
        )
        plus = f"加{t.number(extra)}"
    t.paragraph()
    t.tell(f"{a.name}问：“我们一共有多少个？”", f"“一共有几个呢？”{a.name}歪着头问。")
    t.tell(
        f"{b.name}算了算，说：“{t.number(x)}加{t.number(y)}{plus}等于{t.number(total)}，一共{t.count(total, '个')}！”",
        f"{b.name}说：“我会算！{t.number(x)}加{t.number(y)}{plus}等于{t.number(total)}。”",
    )
    if others:
        more = "和".join(other.full for other in others)
        t.tell(f"这时，{more}来了。", f"{they(a, b)}叫来了{more}。")
    t.tell(
        f"“{t.count(heads, '个')}小伙伴，每个分到{t.count(each, '个')}。”{a.name}一边分一边数。",
        f"{a.name}说：“我们有{t.count(heads, '个')}小伙伴，平均分，每个分到{t.count(each, '个')}。”",
    )
    if left:
        t.tell(
            f"还剩下{t.count(left, '个')}，{they(a, b, *others)}决定送给{elder.full}。",
            f"分完还剩下{t.count(left, '个')}，{b.name}说：“剩下的送给{elder.full}吧！”",
        )
    else:
        t.tell("不多不少，一个也没有剩。", "刚好分完，谁也不多，谁也不少。")
    t.paragraph()
    t.tell(
        f"大家坐在树下吃{fruit}，又香又甜。",
        f"{they(a, b, *others)}一边吃一边笑，{fruit}甜极了。",
        f"“真甜呀！”{b.name}咬了一口，笑得眼睛都眯起来了。",
    )
    t.perhaps(f"{elder.full}听说了，夸{they(a, b)}算得对、分得好。", f"{elder.full}说：“会算的孩子真能干。”")
    return (
        (f"分{fruit}", f"一共有多少个{fruit}", f"摘{fruit}"),
        ("好东西要和朋友一起分享。", "分享的果子最甜。", "算得清楚，分得公平，大家都高兴。"),
    )


def _learn(t: Teller) -> Frame:
    """A child learns a skill. Gain = result of the last day - result of the first day."""
    a, b, elder = *t.children(2), t.elder()
    season = t.opening()
    skills = [
        ("跳绳", "跳", "下", 3, 9),
        ("踢毽子", "踢", "个", 2, 6),
        ("写字", "写对", "个字", 2, 7),
        ("背古诗", "背", "句", 2, 4),
        ("拍皮球", "拍", "下", 4, 9),
    ]
    if season == "夏天":
        skills.append(("游泳", "游", "米", 2, 5))
    skill, verb, measure, low, high = t.one(skills)
    first, days = t.between(low, high), t.between(5, 20)
    last = first * t.between(3, 8) + t.between(0, 4)
    t.tell(
        f"{a.full}看见{b.full}{skill}，羡慕极了，也想学。",
        f"{a.full}下决心要学会{skill}。",
        f"别的小伙伴都会{skill}，只有{a.full}还不会。",
    )
    t.tell(
        f"{elder.full}说：“我来教你。”", f"{a.name}去请{elder.full}教{a.pronoun}。", f"{a.name}拜{elder.full}做了老师。"
    )
    t.paragraph()
    t.tell(
        f"第一天，{a.name}只{verb}了{t.count(first, measure)}，就坚持不住了。",
        f"第一天很难，{a.name}练了很久，最多只{verb}了{t.count(first, measure)}。",
    )
    t.tell(
        f"{a.pronoun}叹了口气：“太难了，我不学了。”",
        f"{a.name}的眼圈红了：“我是不是太笨了？”",
    )
    t.tell(
        f"{elder.full}说：“不要急，每天多一点儿，就会越来越好。”",
        f"{elder.full}笑了笑：“我小时候学{skill}，比你还慢呢。”",
    )
    t.tell(
        f"从那以后，{a.name}天天早起练习，刮风下雨也不停。",
        f"{a.name}点了点头，每天都练，一天也不落下。",
    )
    t.perhaps(f"{b.full}也常来陪{a.pronoun}练。", f"手酸了，{a.name}就歇一会儿再练。")
    t.paragraph()
    t.tell(
        f"到了第{t.count(days, '天')}，{a.name}一口气{verb}了{t.count(last, measure)}，"
        f"比第一天多了{t.count(last - first, measure)}！",
        f"{t.count(days, '天')}过去了，{a.name}能{verb}{t.count(last, measure)}了，"
        f"比第一天多{t.count(last - first, measure)}。",
    )
    t.tell("大家都拍手叫好。", f"{elder.full}高兴地说：“你看，这不是学会了吗？”", f"{a.name}笑了，心里比吃了糖还甜。")
    return (
        (f"学{skill}", f"{a.name}学{skill}", "一天多一点儿"),
        ("世上无难事，只怕有心人。", "每天进步一点儿，就能学会本领。", "坚持就是胜利。"),
    )


def _market(t: Teller) -> Frame:
    """Shopping at a market. Price times number, total and change are right."""
    a, elder = *t.children(1), t.elder()
    (one, unit, price), (two, unit_two, price_two) = t.some(
        (
            ("鸡蛋", "个", 1),
            ("萝卜", "根", 2),
            ("白菜", "棵", 3),
            ("鱼", "条", 9),
            ("面包", "个", 8),
            ("包子", "个", 2),
            ("铅笔", "支", 2),
            ("练习本", "本", 4),
            ("豆腐", "块", 3),
            ("玉米", "根", 2),
        ),
        2,
    )
    many, many_two = t.between(2, 6), t.between(2, 4)
    cost, cost_two = price * many, price_two * many_two
    total = cost + cost_two
    paid = next(note for note in (10, 20, 50, 100) if note > total)
    change, wrong = paid - total, t.between(1, 5)
    t.opening(times=("早晨", "上午"))
    t.tell(
        f"{elder.full}请{a.full}去集市买东西：{t.count(many, unit)}{one}，{t.count(many_two, unit_two)}{two}。",
        f"{a.full}第一次独自去集市，要替{elder.full}买{t.count(many, unit)}{one}和{t.count(many_two, unit_two)}{two}。",
    )
    t.perhaps("集市上真热闹，到处都是叫卖的声音。", f"{a.name}把要买的东西念了一遍又一遍，怕忘了。")
    t.paragraph()
    t.tell(
        f"{one}{t.count(price, '元')}一{unit}，{t.count(many, unit)}是{t.count(cost, '元')}；"
        f"{two}{t.count(price_two, '元')}一{unit_two}，{t.count(many_two, unit_two)}是{t.count(cost_two, '元')}。",
        f"每{unit}{one}{t.count(price, '元')}，{t.count(many, unit)}要{t.count(cost, '元')}。"
        f"每{unit_two}{two}{t.count(price_two, '元')}，{t.count(many_two, unit_two)}要{t.count(cost_two, '元')}。",
    )
    t.tell(f"{a.name}算了算：一共是{t.count(total, '元')}。", f"“一共{t.count(total, '元')}。”{a.name}很快就算出来了。")
    t.tell(f"{a.pronoun}拿出{t.count(paid, '元')}，", f"{a.pronoun}付了{t.count(paid, '元')}，")
    if t.chance():
        t.tell(f"应该找回{t.count(change, '元')}，可是卖东西的大婶找了{t.count(change + wrong, '元')}。")
        t.paragraph()
        t.tell(
            f"“您多给了我{t.count(wrong, '元')}。”{a.name}把多出来的钱还了回去。",
            f"{a.name}走出几步，数了数，又跑回来：“大婶，多了{t.count(wrong, '元')}，还给您！”",
        )
        t.tell("大婶笑着说：“真是个诚实的孩子！”", f"大婶连声道谢，还送给{a.pronoun}一把香葱。")
        morals = ("诚实比金钱更宝贵。", "不是自己的，一分也不要。", "诚实的孩子人人爱。")
    else:
        t.tell(f"找回{t.count(change, '元')}，一分也不差。", f"大婶找给{a.pronoun}{t.count(change, '元')}。")
        t.paragraph()
        t.tell(f"大婶夸道：“小小年纪，算得真快！”{a.name}不好意思地笑了。", f"{a.name}提着篮子，哼着歌往家走。")
        morals = ("学好算术，处处有用。", "自己的事情自己做。", "多算一算，就不会错。")
    t.tell(
        f"回到家，{elder.full}看了看篮子，高兴地说：“一样也没少！”",
        f"{elder.full}接过东西和找回的{t.count(change, '元')}，说：“你长大了。”",
    )
    return (("去集市", f"{a.name}买东西", "一篮子东西"), morals)


def _riddle(t: Teller) -> Frame:
    """A riddle: a wrong guess, why it is wrong, a hint, and the answer."""
    a, b, elder = *t.children(2), t.elder()
    riddle, answer, guess, but, hint = t.one(
        (
            ("有时像个圆盘子，有时像只弯弯的小船", "月亮", "太阳", "太阳从来不弯", "晚上抬起头"),
            ("太阳底下跟着我，走到屋里不见了", "影子", "小狗", "小狗也会跟进屋里", "低头看看脚下"),
            ("看不见，摸不着，一来树叶就跳舞", "风", "小鸟", "小鸟是看得见的", "听听窗外的声音"),
            ("一座小房子，背着到处走，走路慢吞吞", "蜗牛", "马车", "马车走得可不慢", "看看下雨后的墙角"),
            ("天晴关上门，下雨开朵花", "雨伞", "荷花", "荷花天晴也开", "想想下雨天手里拿什么"),
            ("没有嘴，会讲话，千年的故事都知道", "书", "老爷爷", "老爷爷是有嘴的", "看看桌子上有什么"),
            ("兄弟两个一样长，天天一起尝饭菜", "筷子", "勺子", "勺子只有一个", "想想吃饭的时候"),
            ("你笑它也笑，你哭它也哭，就是不出声", "镜子", "小弟弟", "小弟弟哭起来声音可大了", "洗完脸照一照"),
            ("千只眼，万只眼，白天闭上晚上睁", "星星", "路灯", "路灯没有这么多", "夜里看看天空"),
            ("身子白白轻轻飘，落在手心变成水", "雪花", "羽毛", "羽毛不会变成水", "想想冬天的天空"),
            ("没有腿，走不停，嘀嗒嘀嗒报时间", "钟", "小河", "小河不会报时间", "听听墙上的声音"),
            ("一盏红灯笼，挂在绿枝头，咬一口，酸又甜", "樱桃", "灯笼花", "灯笼花不能吃", "想想果园里有什么"),
        )
    )
    t.opening()
    t.tell(
        f"{elder.full}坐在门口，对{a.full}和{b.full}说：“我出个谜语，看谁先猜到。”",
        f"{a.full}和{b.full}缠着{elder.full}讲故事。{elder.full}说：“今天不讲故事，猜谜语。”",
    )
    t.perhaps(
        f"“猜对了，有{t.count(t.between(2, 9), '块')}糖！”{elder.full}又说。",
        f"“太好了，我最爱猜谜语！”{a.name}拍起手来。",
    )
    t.paragraph()
    t.tell(f"谜语是这样的：{riddle}。", f"{elder.full}慢慢地念道：“{riddle}。”")
    t.tell(f"{b.name}抢着说：“我知道，是{guess}！”", f"“是{guess}吧？”{b.name}马上举起了手。")
    t.tell(
        f"{elder.full}摇摇头：“不对，{but}。”",
        f"{a.name}想了想：“不对呀，{but}。”",
    )
    t.tell(f"{elder.full}又说：“给你们一个提示：{hint}。”", f"“{hint}，就知道了。”{elder.full}笑着说。")
    t.perhaps(f"{they(a, b)}想啊想，想了{t.count(t.between(2, 9), '分钟')}。", f"{b.name}急得直抓头。")
    t.paragraph()
    t.tell(f"忽然，{a.name}跳了起来：“是{answer}！”", f"{a.name}眼睛一亮，大声说：“我猜到了，是{answer}！”")
    t.tell(f"{elder.full}哈哈大笑：“猜对了！”", f"“对，就是{answer}！”{elder.full}说。")
    t.perhaps(f"{b.name}也笑了：“真的是{answer}，我怎么没想到呢？”", f"{b.name}说：“再来一个，这次我一定猜到！”")
    return (
        ("猜谜语", f"{elder.full}的谜语", "谁先猜到"),
        ("遇到问题，要多看、多听、多想。", "答案就在身边，就看你会不会发现。", "不要急着回答，先想一想。"),
    )


def _tree(t: Teller) -> Frame:
    """A tree through the seasons. New height = old height + growth."""
    a, elder = *t.children(1), t.elder()
    kind, flower = t.one((("苹果", "白色"), ("桃", "粉红色"), ("梨", "雪白"), ("杏", "粉白"), ("石榴", "火红")))
    tall, grown, years = t.between(3, 9) * 10, t.between(2, 6) * 10, t.between(2, 4)
    fruits = t.between(5, 60)
    t.tell(f"春天，{a.full}在院子里种下一棵小{kind}树。", f"春天来了，{elder.full}送给{a.full}一棵小{kind}树苗。")
    t.tell(f"小树只有{t.count(tall, '厘米')}高，", f"{a.name}量了量，小树高{t.count(tall, '厘米')}，")
    t.tell("细细的，像一根筷子。", "风一吹就摇来摇去。", "只长着几片嫩叶。")
    t.perhaps(
        f"{a.name}问：“它什么时候结果子呀？”{elder.full}说：“要耐心等。”", f"{a.name}给它浇了水，还围了一圈小篱笆。"
    )
    t.paragraph()
    t.tell(f"夏天，太阳很大，{a.name}天天给小树浇水。", f"夏天，叶子上长了虫，{a.name}一只一只地把虫捉走。")
    t.tell(f"秋天，树叶落了，{a.name}把落叶埋在树下做肥料。", f"秋天，一阵大风把小树吹歪了，{a.name}用木棍把它扶正。")
    t.tell(f"冬天，{a.name}用草绳给小树包上了一层“棉衣”。", f"冬天下雪了，{a.name}怕小树冷，给它裹上了旧布。")
    t.paragraph()
    t.tell(
        f"第二年春天，小树长高了{t.count(grown, '厘米')}，有{t.count(tall + grown, '厘米')}高了。",
        f"过了一年，{a.name}又量了量：小树长了{t.count(grown, '厘米')}，现在高{t.count(tall + grown, '厘米')}。",
    )
    t.tell(
        f"又过了{t.count(years, '年')}，树上开满了{flower}的花，",
        f"{t.count(years, '年')}以后的春天，树上开出了{flower}的花，",
    )
    ripe = "夏天" if kind in ("桃", "杏") else "秋天"
    t.tell(
        f"到了{ripe}，结了{t.count(fruits, '个')}又大又甜的{_fruit(kind)}。",
        f"{ripe}一到，枝头挂着{t.count(fruits, '个')}{_fruit(kind)}。",
    )
    t.tell(
        f"{a.name}摘下第一个，送给了{elder.full}。",
        f"{a.name}请大家来吃，大家都说：“真甜！”",
        f"{elder.full}尝了一个，说：“这里面有你的汗水，所以特别甜。”",
    )
    return (
        (f"{a.name}的{kind}树", f"一棵小{kind}树", "种树"),
        ("一分耕耘，一分收获。", "有耐心，才能等到果子。", "爱护小树，小树也会回报你。"),
    )


def _fruit(kind: str) -> str:
    """Fruit of a tree, by the name of the tree without 树."""
    return f"{kind}子" if kind in ("桃", "杏") else kind


def _honest(t: Teller) -> Frame:
    """A child breaks something, hides it, and owns up."""
    a, elder = *t.children(1), t.elder()
    play = t.one(("踢球", "追蝴蝶", "玩捉迷藏", "放纸飞机"))
    broken, measure, price = t.one(
        (("花瓶", "只", 30), ("茶壶", "把", 20), ("花盆", "个", 10), ("瓷碗", "只", 8), ("水罐", "个", 15))
    )
    work, rounds = t.one((("扫院子", "次"), ("浇菜地", "回"), ("喂鸡", "次"), ("收拾书架", "回"))), t.between(2, 6)
    t.opening("春天", "夏天", "秋天")
    t.tell(f"{a.full}在{elder.full}的院子里{play}，", f"{a.full}到{elder.full}家玩，正在院子里{play}，")
    t.tell(f"一不小心，把{elder.pronoun}的{broken}碰倒了。", f"忽然“哗啦”一声，一{measure}{broken}摔在了地上。")
    t.tell(
        f"{broken}碎成了{t.count(t.between(3, 12), '块')}。",
        f"{a.name}一看，{broken}已经碎了，吓得脸都白了。"
        if t.world is VILLAGE
        else f"{a.name}一看，{broken}已经碎了，吓得发抖。",
    )
    t.tell(f"四周没有人看见，{a.name}赶紧跑回了家。", f"{a.name}看看周围，谁也没有看见，就悄悄地溜走了。")
    t.paragraph()
    t.tell(
        f"晚上，{a.name}怎么也睡不着，眼前总是那{measure}碎了的{broken}。",
        f"吃饭的时候，{a.name}一口也吃不下，心里像压着一块石头。",
    )
    t.tell(f"{a.pronoun}想：“做错了事，应该说出来。”", f"{a.pronoun}对自己说：“我要去认错。”")
    t.tell(
        f"第二天一早，{a.name}敲开了{elder.full}的门：“对不起，{broken}是我打破的。”",
        f"第二天，{a.name}找到{elder.full}，低着头说：“{elder.full}，是我打破了{broken}，对不起。”",
    )
    t.perhaps(
        f"{a.pronoun}拿出存下的{t.count(price, '元')}：“这是赔给您的钱。”{elder.full}没有收。"
        if t.world is VILLAGE
        else f"说完，{a.pronoun}的眼泪就掉了下来。",
    )
    t.paragraph()
    t.tell(
        f"{elder.full}没有生气，说：“{broken}碎了可以再买，你说了真话，我很高兴。”",
        f"{elder.full}笑了：“我早就知道了，我一直在等你自己来说。”",
    )
    t.tell(
        f"后来，{a.name}帮{elder.full}{work[0]}，一连做了{t.count(rounds, work[1])}。",
        f"为了补过，{a.name}每天来帮{elder.full}{work[0]}，做了{t.count(rounds, '天')}。",
    )
    t.tell(
        f"{a.pronoun}心里的石头终于落了地。",
        f"{elder.full}常说：“{a.name}是个诚实的好孩子。”",
        f"从此，{a.pronoun}玩的时候小心多了。",
    )
    return (
        (f"打破的{broken}", f"{a.name}认错", "说真话"),
        ("做错了事，承认了就是好孩子。", "说真话需要勇气。", "诚实的人心里最轻松。"),
    )


PLOTS = {
    "help": _help,
    "share": _share,
    "learn": _learn,
    "market": _market,
    "riddle": _riddle,
    "tree": _tree,
    "honest": _honest,
}
"""Plots by name. Each tells a story with a `Teller` and returns the titles and morals that fit it."""
